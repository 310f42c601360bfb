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
from flash_decoding.bench.baselines import flash_infer, peers, pytorch
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
GPU = replace(CASE, device=torch.device("cuda"), dtype=torch.bfloat16)


def reason(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Why a peer does not run a case, were it installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda package: SimpleNamespace())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
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
        ("FlashInfer", {"page_size": 48, "q_len": 8, "window": 8, "heads_q": 96}, None),
        ("FlashInfer", {"dtype": torch.float32}, "takes float16 and bfloat16"),
        ("FlashInfer, CUDA cores", {"q_len": 2}, "takes one query token per sequence, not 2"),
        ("FlashInfer, CUDA cores", {"heads_q": 10}, "knows no groups of 5 query heads per key/value head"),
        ("FlashInfer, CUDA cores", {"heads_q": 16, "window": 8, "page_size": 48}, None),
        ("FlashInfer XQA", {"page_size": 48}, "takes pages of 16, 32, 64, 128, not 48"),
        ("FlashInfer XQA", {"heads_q": 96}, "knows no groups of 48 query heads per key/value head"),
        ("FlashInfer XQA", {"q_len": 2}, "takes one query token per sequence, not 2"),
        ("FlashInfer XQA", {"heads_q": 10, "window": 8, "page_size": 64}, None),
        ("xFormers", {"page_size": 16}, "takes pages in multiples of 64, not 16"),
        ("xFormers", {"page_size": 64, "window": 8}, "takes no window over pages"),
        ("xFormers", {"q_len": 17}, "takes 16 query tokens per sequence at most, not 17"),
        ("xFormers", {"dtype": torch.float32}, "takes float16 and bfloat16"),
        ("xFormers", {"lengths": (1, 96, 2), "page_size": 64, "q_len": 16}, None),
        ("xFormers", {"window": 8}, None),
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


def test_xqa_says_which_gpu_it_is_not_written_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: SimpleNamespace())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    assert flash_infer.XQA.why_not(GPU) == "is not written for a GPU of capability 8.6"


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
