"""The reduction: one program per output row merges the partial outputs of its splits by their log-sum-exp.

    lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s

Which splits are live follows from the lengths, as in the attention kernel; scratch of others is never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import arguments, keys, overlap, repeat, run_parts, softmax
from flash_decoding.kernels.rows import lse_offset
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

BLOCKS = ((4, 128), (8, 128), (16, 64), (32, 32), (64, 16))
"""Splits that a program merges at a time, and of how many columns: the first that are enough. All are of one
size, small enough that programs find places beside those of the attention kernel, and the next call's need
not wait for one."""

LONG_PARTS = 32
"""Parts of a long sequence among many short ones, at most, for which a program makes room at a time. All rows
have a program for each of its blocks of columns, so these had better not be many."""

SPLITS_AHEAD = (2, *(block[0] + 1 for block in BLOCKS[:-1]))
"""Numbers of splits that are combined by kernels that differ."""

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = ["heads", "batch", "max_q_len", "new_tokens", "capacity", "num_splits"]
STRIDES = [
    *("window_left", "window_right", "lse_sequence", "lse_head", "lse_token"),
    *("part_lse_sequence", "part_lse_head", "part_lse_token", "part_lse_split"),
]
TABLES = ["cu_seqlens_q_ptr", "cache_seqlens_ptr", "cache_leftpad_ptr"]


@triton.jit
def live_parts(
    b: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    q_len: tl.tensor,
    batch: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    BALANCED: tl.constexpr,
) -> tl.tuple:
    """First part of a row in the scratch (of all sequences, or of its own), and how many were written."""
    if BALANCED:
        first_part, live = run_parts.parts_of(
            b, num_splits, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
    else:
        row = (token * GROUP + head % GROUP) // BLOCK_M * BLOCK_M
        _, lo, hi = keys.seen_by(
            b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left,
            window_right, GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        first_part = 0
        _, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
        live = keys.live_splits(tiles, num_splits)
    return first_part, live


@triton.jit
def parts_in_scratch(
    flat_row: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    first_part: tl.tensor,
    heads: tl.tensor,
    max_q_len: tl.tensor,
    num_splits: tl.tensor,
    lse_at: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
    BALANCED: tl.constexpr,
) -> tl.tuple:
    """First of a row's parts, in rows of the scratch; elements from one to the next; and where its LSE is."""
    if BALANCED:
        part_row = (tl.cast(first_part, tl.int64) * max_q_len + token) * heads + head
        part_stride, lse_at = max_q_len * heads * HEAD_DIM_V, part_row
    else:
        part_row, part_stride = flat_row * num_splits, HEAD_DIM_V
    return part_row, part_stride, lse_at


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *TABLES])
def combine_kernel(
    parts_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    part_strides: tl.tuple,  # token, head, split; of parts that a caller holds
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    heads: tl.tensor,
    batch: tl.tensor,
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    part_lse_sequence: tl.tensor,
    part_lse_head: tl.tensor,
    part_lse_token: tl.tensor,
    part_lse_split: tl.tensor,
    lse_sequence: tl.tensor,
    lse_head: tl.tensor,
    lse_token: tl.tensor,
    num_splits: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    ALL_LIVE: tl.constexpr,
    BALANCED: tl.constexpr,
    FINISHED: tl.constexpr,  # by the attention kernel, where a row has one part
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        # The attention kernel is all in place by now: who comes next can be, too, while this one waits.
        overlap.let_the_next_kernel_start()
    blocks: tl.constexpr = (HEAD_DIM_V + BLOCK_COLS - 1) // BLOCK_COLS
    pid = tl.program_id(0)
    block = pid % blocks
    head = pid // blocks % heads
    token = pid // (blocks * heads) % max_q_len
    b = pid // (blocks * heads * max_q_len)
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    if token >= q_len:
        overlap.wait_in_first_program(OVERLAP)
        return
    first_part, live_splits = 0, num_splits
    if not ALL_LIVE:
        first_part, live_splits = live_parts(
            b, token, head, q_len, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, GROUP, BLOCK_M, BLOCK_N,
            BOUND_LEFT, BOUND_RIGHT, BALANCED,
        )  # fmt: skip
        if FINISHED:
            if live_splits == 1:
                overlap.wait_in_first_program(OVERLAP)
                return

    # Scalars go to the pointers first: folded into the block of offsets, Triton 3.5 and 3.6 have been seen to
    # miscompile a reduction of this shape.
    flat_row = (q_start + token) * heads + head
    strides = (part_lse_sequence, part_lse_head, part_lse_token)
    lse_at = lse_offset(strides, b, q_start, token, head, cu_seqlens_q_ptr)
    cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    in_row = cols < HEAD_DIM_V
    peak, total = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
    acc = tl.zeros((BLOCK_COLS,), tl.float32)
    if ALL_LIVE:
        parts = parts_ptr + (q_start + token) * part_strides[0] + head.to(tl.int64) * part_strides[1]
        split_stride = part_strides[2]
    else:  # scratch of our own is contiguous, which tells the compiler how it is aligned
        part_row, split_stride, lse_at = parts_in_scratch(
            flat_row, token, head, first_part, heads, max_q_len, num_splits, lse_at, HEAD_DIM_V, BALANCED
        )
        if OVERLAP:
            overlap.wait_knowing(part_row, lse_at, live_splits, flat_row)
        parts = parts_ptr + part_row * HEAD_DIM_V
    part_lse = part_lse_ptr + lse_at
    for start in range(0, live_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        live = splits < live_splits
        lse_ptrs = part_lse + splits.to(tl.int64) * part_lse_split
        lse_s = tl.load(lse_ptrs, mask=live, other=float("-inf"))
        offsets = (splits.to(tl.int64) * split_stride)[:, None] + cols[None, :]
        out_s = tl.load(parts + offsets, mask=live[:, None] & in_row[None, :], other=0.0)
        out_s = out_s.to(tl.float32)
        if ALL_LIVE:  # a part that saw nothing counts for nothing, whatever its caller left there
            out_s = tl.where((lse_s == float("-inf"))[:, None], 0.0, out_s)
        peak_s, total_s, acc_s = softmax.from_partials(lse_s, out_s)
        peak, total, acc = softmax.merge(peak, total, acc, peak_s, total_s, acc_s)

    out = out_ptr + flat_row * HEAD_DIM_V
    tl.store(out + cols, (acc * softmax.inverse(total)).to(out_ptr.dtype.element_ty), mask=in_row)
    if lse_ptr is not None and block == 0:
        strides = (lse_sequence, lse_head, lse_token)
        lse = lse_ptr + lse_offset(strides, b, q_start, token, head, cu_seqlens_q_ptr)
        tl.store(lse, softmax.log_sum_exp(peak, total))


def launch(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    parts: Tensor,
    part_lse: Tensor,
    part_lse_strides: tuple[int, int, int, int],
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int],
) -> repeat.Repeat | None:
    """Merge the scratch of ``attend.launch``; what comes back repeats it.

    Args:
        queries: the query tokens.
        cache: the keys and values, for their lengths.
        options: the windows, for what was live.
        plan: the plan that the attention kernel ran with.
        parts: (tokens, heads_q, num_splits, head_dim_v) fp32.
        part_lse: (tokens, heads_q, num_splits) fp32.
        part_lse_strides: of part_lse, for (sequence, head, token, split).
        out: contiguous (tokens, heads_q, head_dim_v).
        lse: where the log-sum-exps go, or None.
        lse_strides: of lse, for (sequence, head, token).
    """
    heads, num_splits = queries.heads, plan.num_splits
    block = block_of(parts_of_a_row(plan, queries.batch), parts.shape[-1])
    blocks = triton.cdiv(parts.shape[-1], block["BLOCK_COLS"])
    args = (
        parts,
        part_lse,
        out,
        lse,
        (0, 0, 0),
        cache.cache_seqlens,
        cache.cache_leftpad,
        queries.cu_seqlens_q,
        options.window_left,
        options.window_right,
        heads,
        queries.batch,
        queries.q_len,
        cache.new_tokens,
        cache.capacity,
        *part_lse_strides,
        *lse_strides,
        num_splits,
    )
    constants = {
        **block,
        "ALL_LIVE": False,
        "BALANCED": plan.balanced,
        **arguments.of_reduction(queries, cache, options, plan, parts.shape[-1]),
    }
    return repeat.launch(combine_kernel, blocks * queries.batch * queries.q_len * heads, args, constants)


def parts_of_a_row(plan: Plan, batch: int) -> int:
    """About how many parts those rows have whose program has something to do.

    Where there are fewer runs than sequences, only long ones have more than one part, and those have many.
    """
    if not plan.balanced:
        return plan.num_splits
    return plan.num_splits // batch or min(plan.num_splits, LONG_PARTS)


def block_of(parts: int, head_dim_v: int) -> dict[str, int]:
    """Parts merged at a time, for rows that have about so many, and columns per program; as constants."""
    at_once, columns = next((block for block in BLOCKS if parts <= block[0]), BLOCKS[-1])
    return {"BLOCK_S": at_once, "BLOCK_COLS": min(columns, padded(head_dim_v))}
