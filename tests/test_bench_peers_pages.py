"""FlashInfer and xFormers: stand-ins with their signatures get all they need for the right answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding import flash_attn
from flash_decoding.bench.baselines import flash_infer, xformers_splitk
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Truth
from flash_decoding.bench.column import Column
from flash_decoding.bench.inputs import make_inputs

CPU = torch.device("cpu")
CASE = Case(batch=3, kv_len=192, dtype=torch.float32, device=CPU, heads_q=4, heads_kv=2, head_dim=32)
PAGED = replace(CASE, lengths=(1, 192, 70), page_size=64)
ONE_TOKEN = {
    "equal": CASE,
    "ragged": replace(CASE, lengths=(1, 192, 70)),
    "pages": PAGED,
    "window": replace(CASE, window=20),
    "many heads": replace(CASE, heads_q=16),
}
DRAFTS = {
    "drafts": replace(CASE, q_len=4),
    "drafts in pages": replace(PAGED, q_len=2, lengths=(2, 192, 70)),
    "drafts in a window": replace(CASE, window=20, q_len=2),
}
KINDS = {**ONE_TOKEN, **DRAFTS}


def passes(column: Column, case: Case) -> bool:
    """Whether what a column returns for a case agrees with the reference."""
    inputs = make_inputs(case, seed=0)
    return Truth.of(case, inputs).judge("peer", column.ways[0].prepare(case, inputs)()).passed


def attend(q: Tensor, k: Tensor, v: Tensor, window_left: int) -> Tensor:
    """(tokens, heads, head_dim) of one sequence, causal, with a window as FlashInfer counts it."""
    right = 0 if window_left >= 0 else -1
    window = (window_left, right)
    return flash_attn.flash_attn_func(q[None], k[None], v[None], causal=True, window_size=window)[0]


class Wrapper:
    """FlashInfer's paged wrappers, as far as they are called: plan with where things lie, then run."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "NHD")

    def _plan(self, rows: Tensor, where: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, ...]) -> None:
        assert all(x.dtype == torch.int32 for x in (rows, *where))
        self.rows, (self.starts, self.pages, self.last), self.sizes = rows, where, sizes

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        """Each sequence by itself, from the plan alone."""
        page_size, heads, head_dim = paged_kv_cache[0].shape[1:]
        assert self.sizes == (q.shape[1], heads, head_dim, page_size)
        outs = []
        for b in range(self.last.numel()):
            owned = self.pages[self.starts[b] : self.starts[b + 1]].long()
            length = page_size * (len(owned) - 1) + int(self.last[b])
            k, v = (x[owned].flatten(0, 1)[:length] for x in paged_kv_cache)
            outs.append(attend(q[self.rows[b] : self.rows[b + 1]], k, v, self.window))
        return torch.cat(outs)

    window = -1


class DecodeWrapper(Wrapper):
    """``BatchDecodeWithPagedKVCacheWrapper``."""

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, use_tensor_cores: bool = False
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        *sizes: int,
        window_left: int = -1,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """One query token for each sequence."""
        assert q_data_type == kv_data_type == torch.float32
        assert self.use_tensor_cores or sizes[0] // sizes[1] in flash_infer.CUDA_CORE_GROUPS
        rows = torch.arange(last_page_len.numel() + 1, dtype=torch.int32)
        self._plan(rows, (indptr, indices, last_page_len), sizes)
        self.window = window_left


class PrefillWrapper(Wrapper):
    """``BatchPrefillWithPagedKVCacheWrapper``."""

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", *, backend: str = "auto"
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert backend == "fa2"

    def plan(
        self,
        *told: Any,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """Told where query tokens start, then the same as above."""
        assert causal
        assert q_data_type == kv_data_type == torch.float32
        self._plan(told[0], told[1:4], told[4:])
        self.window = window_left


def trtllm_batch_decode_with_kv_cache(
    *operands: Any,
    bmm1_scale: float = 1.0,
    bmm2_scale: float = 1.0,
    window_left: int = -1,
    kv_layout: str = "HND",
    backend: str = "auto",
) -> Tensor:
    """Its scales have to be Python's floats, its workspace zero; other layouts are other kernels."""
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len = operands
    assert (kv_layout, backend, bmm2_scale) == ("NHD", "xqa", 1.0)
    assert isinstance(bmm1_scale, float)
    assert not workspace_buffer.any()
    assert (block_tables.dtype, seq_lens.dtype, max_seq_len) == (
        torch.int32,
        torch.int32,
        int(seq_lens.max()),
    )
    scaled = query * bmm1_scale * query.shape[-1] ** 0.5
    rows = [[x[row.long()].flatten(0, 1) for x in kv_cache] for row in block_tables]
    outs = [
        attend(scaled[b : b + 1], k[:length], v[:length], window_left)
        for b, ((k, v), length) in enumerate(zip(rows, seq_lens.tolist(), strict=True))
    ]
    return torch.cat(outs)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer, as if it were installed."""
    top = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=DecodeWrapper, BatchPrefillWithPagedKVCacheWrapper=PrefillWrapper
    )
    decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache=trtllm_batch_decode_with_kv_cache)
    monkeypatch.setitem(sys.modules, "flashinfer", top)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)
    monkeypatch.setattr(flash_infer, "WORKSPACE", 16)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_flashinfer_on_tensor_cores_is_handed_what_it_needs(case: Case) -> None:
    assert passes(flash_infer.TENSOR_CORES, case)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("case", ONE_TOKEN.values(), ids=ONE_TOKEN)
@pytest.mark.parametrize("column", [flash_infer.CUDA_CORES, flash_infer.XQA], ids=lambda column: column.name)
def test_flashinfer_for_one_token_is_handed_what_it_needs(column: Column, case: Case) -> None:
    assert passes(column, case)


@pytest.mark.usefixtures("flashinfer")
def test_calls_share_a_workspace_and_xqa_has_its_own() -> None:
    flash_infer.workspace.cache_clear()
    shared, own = (flash_infer.workspace(owner, CPU) for owner in ("wrappers", "xqa"))
    assert shared is flash_infer.workspace("wrappers", CPU)
    assert shared.data_ptr() != own.data_ptr()


@dataclass(frozen=True, eq=False)
class Bias:
    """The classes of xFormers' ``attn_bias`` that are used, with the arguments of their constructors."""

    q_seqlen: list[int]
    kv_seqlen: list[int]
    kv_padding: int = 0
    block_tables: Tensor | None = None
    page_size: int = 0
    window_size: int = 0
    device: torch.device = CPU

    @classmethod
    def paged(cls, **told: Any) -> Bias:
        """Over pages, whose classes know no padding and no window."""
        assert set(told) == {"q_seqlen", "kv_seqlen", "block_tables", "page_size", "device"}
        return cls(**told)

    @classmethod
    def padded(cls, **told: Any) -> Bias:
        """Sequences side by side."""
        assert set(told) == {"q_seqlen", "kv_padding", "kv_seqlen", "device"}
        return cls(**told)

    @classmethod
    def local(cls, **told: Any) -> Bias:
        """With a window; this constructor takes no device."""
        assert set(told) == {"q_seqlen", "kv_padding", "kv_seqlen", "window_size"}
        return cls(**told)


@dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """``fmha.Inputs``."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Bias

    def validate_inputs(self) -> None:
        """Five dimensions each; a group that is expanded has no stride."""
        assert self.query.dim() == self.key.dim() == self.value.dim() == 5
        assert self.key.stride(3) == self.value.stride(3) == 0


class Operator:
    """``triton_splitk.FwOp``."""

    @classmethod
    def apply(cls, inp: Told, needs_gradient: bool) -> tuple[Tensor, None]:
        """Each sequence by itself, from the bias alone."""
        bias, outs, first = inp.attn_bias, [], 0
        for b, (q_len, length) in enumerate(zip(bias.q_seqlen, bias.kv_seqlen, strict=True)):
            k, v = (x[0, cls.slots(bias, b), :, 0][:length] for x in (inp.key, inp.value))
            q = inp.query[0, first : first + q_len].flatten(1, 2)
            outs.append(attend(q, k, v, bias.window_size - 1))
            first += q_len
        assert not needs_gradient
        return torch.cat(outs).reshape(inp.query.shape), None

    @staticmethod
    def slots(bias: Bias, b: int) -> Tensor:
        """Where the keys of a sequence lie."""
        if bias.block_tables is None:
            return torch.arange(bias.kv_padding) + b * bias.kv_padding
        pages = bias.block_tables[b].long()[:, None] * bias.page_size
        return (pages + torch.arange(bias.page_size)).flatten()


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """XFormers, as if it were installed."""
    biases = SimpleNamespace(
        PagedBlockDiagonalCausalWithOffsetPaddedKeysMask=SimpleNamespace(from_seqlens=Bias.paged),
        BlockDiagonalCausalWithOffsetPaddedKeysMask=SimpleNamespace(from_seqlens=Bias.padded),
        BlockDiagonalCausalLocalAttentionPaddedKeysMask=SimpleNamespace(from_seqlens_local=Bias.local),
    )
    fmha = SimpleNamespace(Inputs=Told, attn_bias=biases, triton_splitk=SimpleNamespace(FwOp=Operator))
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(fmha=fmha))


@pytest.mark.usefixtures("xformers")
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_xformers_is_handed_what_it_needs(case: Case) -> None:
    assert passes(xformers_splitk.SPLITK, case)
