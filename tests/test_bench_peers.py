"""Adapters of other libraries: what they refuse by name, and that they hand over what they should."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding import flash_attn
from flash_decoding.bench.baselines import peers, pytorch
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Truth
from flash_decoding.bench.inputs import make_inputs

CPU = torch.device("cpu")
CASE = Case(batch=3, kv_len=96, dtype=torch.float32, device=CPU, heads_q=4, heads_kv=2, head_dim=32)
PAGED = replace(CASE, lengths=(1, 96, 40), page_size=16)
KINDS = {
    "equal": CASE,
    "pages": PAGED,
    "drafts": replace(CASE, q_len=4),
    "window": replace(CASE, window=20),
    "drafts in pages": replace(PAGED, q_len=2, lengths=(2, 96, 40)),
}
GPU = replace(CASE, device=torch.device("cuda"))


def reason(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a peer does not run a case, were it installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda package: SimpleNamespace())
    (column,) = (column for column in (*peers.PEERS, *pytorch.SDPA, pytorch.UNSPLIT) if column.name == name)
    return column.why_not(case)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("flash-attn", {"page_size": 16}, "takes pages in multiples of 256, not 16"),
        ("flash-attn", {"page_size": 256}, None),
        ("flash-attn 3", {"page_size": 16}, None),
        ("FlashInfer", {"kv_len": 90}, "length 90 is not a multiple of 16"),
        ("FlashInfer", {"kv_len": 90, "page_size": 16}, None),
        ("xFormers", {"page_size": 16}, "takes no pages, here of 16"),
        ("xFormers", {"window": 8}, "takes no window, here of 8"),
        ("xFormers", {"lengths": (1, 96, 2)}, None),
        ("vLLM", {"page_size": 64}, "takes pages of 8, 16, 32, not 64"),
        ("vLLM", {"q_len": 2}, "takes one query token per sequence, not 2"),
        ("vLLM", {"page_size": 16}, None),
        ("SDPA flash", {"lengths": (1, 96, 2)}, "takes no lengths that differ"),
        ("SDPA flash", {"window": 8, "q_len": 2}, "takes no window for several query tokens"),
        ("SDPA cuDNN", {"page_size": 16}, "takes no pages, here of 16"),
        ("SDPA cuDNN", {"window": 8}, None),
        ("FA2, no split", {"page_size": 16}, "takes no pages, here of 16"),
        ("FA2, no split", {"q_len": 2, "window": 8}, None),
    ],
)
def test_a_peer_says_by_name_what_it_does_not_take(
    name: str, changes: dict[str, Any], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason(name, replace(GPU, **changes), monkeypatch) == told


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("version", [2, 3])
def test_what_flash_attn_is_handed_gives_the_right_answer(
    version: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours has its signature, but for the name of the table in version 3."""

    def newer(q: Tensor, k: Tensor, v: Tensor, *, page_table: Tensor | None = None, **rest: Any) -> Any:
        return flash_attn.flash_attn_with_kvcache(q, k, v, block_table=page_table, **rest)

    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_with_kvcache=newer))
    inputs = make_inputs(case, seed=0)
    result = peers.PEERS[version - 2].ways[0].prepare(case, inputs)()
    assert Truth.of(case, inputs).judge("peer", result).passed


class Wrapper:
    """FlashInfer's wrappers, as far as they are called: plan with where things lie, run with q and pages."""

    def __init__(self, workspace: Tensor, layout: str, **more: object) -> None:
        assert layout == "NHD"

    def plan(self, *told: Any, window_left: int, causal: bool = True, **dtypes: torch.dtype) -> None:
        self.q_ends = told[0] if len(told) == 8 else None
        self.starts, self.pages, self.last = told[-7:-4]
        assert told[-4:] == (4, 2, 32, 16)
        self.window = (window_left, 0 if window_left >= 0 else -1)

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        """Each sequence by itself, from the plan alone."""
        outs = []
        batch = self.last.numel()
        ends = torch.arange(batch + 1) if self.q_ends is None else self.q_ends
        for b in range(batch):
            owned = self.pages[self.starts[b] : self.starts[b + 1]].long()
            length = 16 * (len(owned) - 1) + int(self.last[b])
            k, v = (x[owned].flatten(0, 1)[None, :length] for x in cache)
            mine = q[None, ends[b] : ends[b + 1]]
            outs.append(flash_attn.flash_attn_func(mine, k, v, causal=True, window_size=self.window)[0])
        return torch.cat(outs)


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_what_flashinfer_is_handed_gives_the_right_answer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**dict.fromkeys(names, Wrapper)))
    monkeypatch.setattr(peers, "WORKSPACE", 16)
    inputs = make_inputs(case, seed=0)
    (column,) = (column for column in peers.PEERS if column.name == "FlashInfer")
    assert Truth.of(case, inputs).judge("peer", column.ways[0].prepare(case, inputs)()).passed
