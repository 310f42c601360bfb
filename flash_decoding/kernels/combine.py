"""The reduction: one program per output row merges the partial outputs of its splits by their log-sum-exp.

    lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s

Which splits are live follows from the lengths, as in the attention kernel; scratch of others is never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import keys, softmax
from flash_decoding.kernels.attend import block_of
from flash_decoding.kernels.rows import lse_offset

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

BLOCK_S = 32
"""Splits merged at a time. More would not fit the registers of 4 warps at head_dim 256."""

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = ["heads", "max_q_len", "new_tokens", "capacity", "num_splits", "split_tiles"]
STRIDES = ["window_left", "window_right", "part_lse_strides", "lse_strides"]
TABLES = ["cu_seqlens_q_ptr", "cache_seqlens_ptr", "cache_leftpad_ptr"]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *TABLES])
def combine_kernel(
    parts_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part_strides: tl.tuple,  # token, head, split
    part_lse_strides: tl.tuple,  # sequence, head, token, split
    lse_strides: tl.tuple,  # sequence, head, token
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    heads: tl.tensor,
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    ALL_LIVE: tl.constexpr,
) -> None:
    pid = tl.program_id(0)
    head = pid % heads
    token = pid // heads % max_q_len
    b = pid // (heads * max_q_len)
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    if token >= q_len:
        return
    live_splits = num_splits
    if not ALL_LIVE:
        row = (token * GROUP + head % GROUP) // BLOCK_M * BLOCK_M
        first, end = keys.live_slots(b, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity)
        lo, hi = keys.visible_slots(
            row, q_len, first, end, window_left, window_right, GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT
        )
        _, _, _, live_splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK_N)

    # Scalars go to the pointers first: folded into the block of offsets, Triton 3.5 and 3.6 have been seen to
    # miscompile a reduction of this shape.
    parts = parts_ptr + (q_start + token) * part_strides[0] + head.to(tl.int64) * part_strides[1]
    part_lse = part_lse_ptr + lse_offset(part_lse_strides, b, q_start, token, head, cu_seqlens_q_ptr)
    cols = tl.arange(0, BLOCK_DV)
    peak, total, acc = (
        tl.cast(float("-inf"), tl.float32),
        tl.cast(0.0, tl.float32),
        tl.zeros((BLOCK_DV,), tl.float32),
    )
    for start in range(0, live_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        lse_s = tl.load(
            part_lse + splits.to(tl.int64) * part_lse_strides[3],
            mask=splits < live_splits,
            other=float("-inf"),
        )
        keep = (lse_s > float("-inf"))[:, None] & (cols < HEAD_DIM_V)[None, :]
        offsets = (splits.to(tl.int64) * part_strides[2])[:, None] + cols[None, :]
        out_s = tl.load(parts + offsets, mask=keep, other=0.0).to(tl.float32)
        peak_s, total_s, acc_s = softmax.from_partials(lse_s, out_s)
        peak, total, acc = softmax.merge(peak, total, acc, peak_s, total_s, acc_s)

    out = out_ptr + ((q_start + token) * heads + head) * HEAD_DIM_V
    tl.store(
        out + cols, (acc / softmax.denominator(total)).to(out_ptr.dtype.element_ty), mask=cols < HEAD_DIM_V
    )
    if lse_ptr is not None:
        lse = lse_ptr + lse_offset(lse_strides, b, q_start, token, head, cu_seqlens_q_ptr)
        tl.store(lse, softmax.log_sum_exp(peak, total))


def launch(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    parts: Tensor,
    part_lse: Tensor,
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int],
) -> None:
    """Merge the scratch of ``attend.launch``.

    Args:
        queries: the query tokens.
        cache: the keys and values, for their lengths.
        options: the windows, for what was live.
        plan: the plan that the attention kernel ran with.
        parts: (tokens, heads_q, num_splits, head_dim_v) fp32.
        part_lse: (tokens, heads_q, num_splits) fp32.
        out: contiguous (tokens, heads_q, head_dim_v).
        lse: where the log-sum-exps go, or None.
        lse_strides: of lse, for (sequence, head, token).
    """
    heads, num_splits = queries.heads, plan.num_splits
    sequence_stride = 0 if queries.is_ragged else queries.q_len * heads * num_splits
    tile = plan.tile
    combine_kernel[(queries.batch * queries.q_len * heads,)](
        parts,
        part_lse,
        out,
        lse,
        parts.stride()[:3],
        (sequence_stride, num_splits, heads * num_splits, 1),
        lse_strides,
        cache.cache_seqlens,
        cache.cache_leftpad,
        queries.cu_seqlens_q,
        options.window_left,
        options.window_right,
        heads,
        queries.q_len,
        cache.new_tokens,
        cache.capacity,
        num_splits,
        plan.split_tokens // tile.block_n,
        GROUP=heads // cache.heads,
        HEAD_DIM_V=parts.shape[-1],
        BLOCK_DV=block_of(parts.shape[-1]),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_S=BLOCK_S,
        ALL_LIVE=False,
        **keys.bounds(options, queries.q_len),
    )


def merge(outs: Tensor, lses: Tensor, *, out: Tensor, lse: Tensor) -> None:
    """Merge partial results that the caller holds, with the same kernel: every one of them is live.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v).
        lses: (splits, batch, heads_q, q_len) fp32.
        out: contiguous (batch, q_len, heads_q, head_dim_v).
        lse: contiguous (batch, heads_q, q_len) fp32.
    """
    splits, batch, q_len, heads, head_dim_v = outs.shape
    tokens = outs.flatten(1, 2)
    combine_kernel[(batch * q_len * heads,)](
        tokens,
        lses,
        out,
        lse,
        (tokens.stride(1), tokens.stride(2), tokens.stride(0)),
        (*lses.stride()[1:], lses.stride(0)),
        lse.stride(),
        None,
        None,
        None,
        -1,
        -1,
        heads,
        q_len,
        0,
        0,
        splits,
        0,
        GROUP=1,
        HEAD_DIM_V=head_dim_v,
        BLOCK_DV=block_of(head_dim_v),
        BLOCK_M=1,
        BLOCK_N=1,
        BLOCK_S=BLOCK_S,
        BOUND_LEFT=False,
        BOUND_RIGHT=False,
        ALL_LIVE=True,
    )
