"""xFormers' split attention in Triton, ``fmha.triton_splitk``, which works without its compiled extension.

``memory_efficient_attention_forward`` refuses to work without that extension, so the operator itself is
called.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flash_decoding.bench.baselines.able import cuda_only, first_of, half_precision, installed
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column
from flash_decoding.bench.inputs import Inputs

PAGE_MULTIPLE = 64
"""Keys in a tile of the operator; a page has to hold whole tiles."""

MOST_TOKENS = 16
"""Query tokens per sequence that it takes with a causal mask."""


def what_it_takes(case: Case) -> str | None:
    """The ``why_not`` of the operator, of the kind of work alone."""
    if case.page_size % PAGE_MULTIPLE:
        return f"takes pages in multiples of {PAGE_MULTIPLE}, not {case.page_size}"
    if case.page_size and case.window:
        return "takes no window over pages"
    if case.q_len > MOST_TOKENS:
        return f"takes {MOST_TOKENS} query tokens per sequence at most, not {case.q_len}"
    return None


def _prepare(case: Case, inputs: Inputs) -> Call:
    """Keys of all sequences in one row, heads as (heads_kv, group) with the group expanded."""
    from xformers.ops import fmha

    shape = (1, case.batch * case.q_len, case.heads_kv, case.group, case.head_dim)
    k, v = (
        x.flatten(0, 1)[None, :, :, None, :].expand(-1, -1, -1, case.group, -1) for x in (inputs.k, inputs.v)
    )
    told = fmha.Inputs(
        query=inputs.q.reshape(shape), key=k, value=v, attn_bias=_bias(fmha.attn_bias, case, inputs)
    )
    told.validate_inputs()

    def call() -> Tensor:
        out: Tensor = fmha.triton_splitk.FwOp.apply(told, needs_gradient=False)[0]
        return out

    return call


def _bias(biases: Any, case: Case, inputs: Inputs) -> Any:
    """Who sees what, in the classes of ``xformers.ops.fmha.attn_bias``."""
    q_lens, lengths = [case.q_len] * case.batch, list(case.live)
    if inputs.block_table is not None:
        return biases.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=q_lens,
            kv_seqlen=lengths,
            block_tables=inputs.block_table,
            page_size=case.page_size,
            device=case.device,
        )
    if case.window:
        return biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
            q_seqlen=q_lens, kv_padding=case.kv_len, kv_seqlen=lengths, window_size=case.window
        )
    return biases.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=q_lens, kv_padding=case.kv_len, kv_seqlen=lengths, device=case.device
    )


SPLITK = Column.simple(
    "xFormers",
    "its Triton operator with splits, fmha.triton_splitk.FwOp, grouped heads expanded without a copy",
    _prepare,
    why_not=first_of(installed("xformers"), cuda_only, half_precision, what_it_takes),
)
