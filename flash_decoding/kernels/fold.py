"""The reduction of batch-invariant calls: one program per output row merges states in an order of their own.

Leaves of a split are merged from left to right, where they were not in the attention kernel; splits of a
lane likewise, LANES apart; and in the end all lanes at once. So the order follows from the sequence's own
length (:mod:`~flash_decoding.kernels.fixed_sizes`), never from who wrote which part, or how many there could
have been.

States stay as they are, ``(peak, total, acc)``, until there is one: with a single split it is divided here as
an attention kernel that has nothing to merge does, and has the bits that it would have there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import fixed_sizes, keys, overlap, repeat, softmax
from flash_decoding.kernels.rows import lse_offset
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

LANES = tl.constexpr(8)
"""Splits merged at a time. It tells the order of sums, so no size may change it, nor may the next two."""

FEW_PARTS = 24
"""Parts of a row up to which they are loaded one after the other: programs are small then, and rows many."""

COLUMNS = 128
NUM_WARPS = 1

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = [
    *("heads", "max_q_len", "new_tokens", "capacity", "window_left", "window_right"),
    *("lse_sequence", "lse_head", "lse_token", "num_parts", "split_tiles", "leaf_tiles", "by_leaf"),
]
TABLES = ["cu_seqlens_q_ptr", "cache_seqlens_ptr", "cache_leftpad_ptr"]


@triton.jit
def empty(COLS: tl.constexpr) -> tl.tuple:
    """States of lanes that have seen no key."""
    peak, totals, acc = softmax.empty(LANES, 1, COLS)
    return peak, tl.sum(totals, 1), acc


@triton.jit
def load_states(
    parts: tl.tensor,
    sums: tl.tensor,
    at: tl.tensor,
    per_split: tl.tensor,
    live_parts: tl.tensor,
    cols: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
) -> tl.tuple:
    """States of one part for each lane, the ``at``-th of all that the lane merges; empty where there is none.

    Lanes have splits LANES apart, each of ``per_split`` parts.
    """
    split = at // per_split * LANES + tl.arange(0, LANES)
    part = split * per_split + at % per_split
    live = part < live_parts
    part = part.to(tl.int64)
    peak = tl.load(sums + part * 2, mask=live, other=float("-inf"))
    total = tl.load(sums + part * 2 + 1, mask=live, other=0.0)
    mask = live[:, None] & (cols < HEAD_DIM_V)[None, :]
    acc = tl.load(parts + (part * HEAD_DIM_V)[:, None] + cols[None, :], mask=mask, other=0.0)
    return peak, total, acc


@triton.jit
def take(
    at: tl.tensor,
    count: tl.tensor,
    per_split: tl.tensor,
    lane: tl.tuple,  # states of the splits before, of this one so far, and of the part to merge
    split: tl.tuple,
    part: tl.tuple,
) -> tl.tuple:
    """Merge a part into its split; where a split begins, the one before into the lane."""
    lane_peak, lane_total, lane_acc = lane
    peak, total, acc = split
    if (at < count) & (at % per_split == 0):
        lane_peak, lane_total, lane_acc = softmax.fold(lane_peak, lane_total, lane_acc, peak, total, acc)
        peak, total, acc = empty(acc.shape[1])
    peak, total, acc = softmax.fold(peak, total, acc, part[0], part[1], part[2])
    return (lane_peak, lane_total, lane_acc), (peak, total, acc)


@triton.jit
def shares(
    lo: tl.tensor,
    hi: tl.tensor,
    num_parts: tl.tensor,
    split_tiles: tl.tensor,
    leaf_tiles: tl.tensor,
    by_leaf: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """How many parts were written of [lo, hi), how many a split has, and how many each lane merges."""
    _, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
    size, _, live_parts = fixed_sizes.share(tiles, num_parts, split_tiles, leaf_tiles, by_leaf)
    split, _ = fixed_sizes.sizes(tiles, split_tiles, leaf_tiles)
    per_split = split // size
    # a single split may not have all of its leaves
    count = tl.where(live_parts <= per_split, live_parts, tl.cdiv(live_parts, per_split * LANES) * per_split)
    return live_parts, per_split, count


@triton.jit(do_not_specialize=[*SIZES, *TABLES])
def fold_kernel(
    parts_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    heads: tl.tensor,
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    lse_sequence: tl.tensor,
    lse_head: tl.tensor,
    lse_token: tl.tensor,
    num_parts: tl.tensor,
    split_tiles: tl.tensor,
    leaf_tiles: tl.tensor,
    by_leaf: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    FEW_PARTS: tl.constexpr,
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
        return
    row = (token * GROUP + head % GROUP) // BLOCK_M * BLOCK_M
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    live, per_split, count = shares(lo, hi, num_parts, split_tiles, leaf_tiles, by_leaf, BLOCK_N)
    flat_row = (q_start + token) * heads + head
    if OVERLAP:
        overlap.wait_knowing(flat_row, live, per_split, count)
    parts = parts_ptr + flat_row * num_parts * HEAD_DIM_V
    sums = part_lse_ptr + flat_row * num_parts * 2
    cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    lane, split = empty(BLOCK_COLS), empty(BLOCK_COLS)
    if FEW_PARTS:
        for at in range(count):
            part = load_states(parts, sums, at, per_split, live, cols, HEAD_DIM_V)
            lane, split = take(at, count, per_split, lane, split, part)
    else:
        for at in range(0, count, 4):  # four are on their way together
            part_0 = load_states(parts, sums, at, per_split, live, cols, HEAD_DIM_V)
            part_1 = load_states(parts, sums, at + 1, per_split, live, cols, HEAD_DIM_V)
            part_2 = load_states(parts, sums, at + 2, per_split, live, cols, HEAD_DIM_V)
            part_3 = load_states(parts, sums, at + 3, per_split, live, cols, HEAD_DIM_V)
            lane, split = take(at, count, per_split, lane, split, part_0)
            lane, split = take(at + 1, count, per_split, lane, split, part_1)
            lane, split = take(at + 2, count, per_split, lane, split, part_2)
            lane, split = take(at + 3, count, per_split, lane, split, part_3)
    peak_s, total_s, acc_s = softmax.fold(lane[0], lane[1], lane[2], split[0], split[1], split[2])
    peak, total, acc = softmax.join(peak_s, total_s, acc_s)

    out = (acc / softmax.denominator(total)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + flat_row * HEAD_DIM_V + cols, out, mask=cols < HEAD_DIM_V)
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
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int],
) -> repeat.Repeat | None:
    """Merge the states that attention wrote for a plan of fixed sizes; what comes back repeats it.

    Args:
        queries: the query tokens.
        cache: the keys and values, for their lengths.
        options: the windows, for what was live.
        plan: the plan that the attention kernel ran with.
        parts: contiguous (tokens, heads_q, num_parts, head_dim_v) fp32.
        part_lse: contiguous (tokens, heads_q, num_parts, 2) fp32.
        out: contiguous (tokens, heads_q, head_dim_v).
        lse: where the log-sum-exps go, or None.
        lse_strides: of lse, for (sequence, head, token).
    """
    heads, head_dim_v = queries.heads, parts.shape[-1]
    columns = min(COLUMNS, padded(head_dim_v))
    args = (
        parts,
        part_lse,
        out,
        lse,
        cache.cache_seqlens,
        cache.cache_leftpad,
        queries.cu_seqlens_q,
        options.window_left,
        options.window_right,
        heads,
        queries.q_len,
        cache.new_tokens,
        cache.capacity,
        *lse_strides,
        plan.num_splits,
        *fixed_sizes.arguments(plan),
    )
    constants = {
        "GROUP": heads // cache.heads,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_COLS": columns,
        "BLOCK_M": plan.tile.block_m,
        "BLOCK_N": plan.tile.block_n,
        "FEW_PARTS": plan.num_splits <= FEW_PARTS,
        "OVERLAP": plan.overlap,
        "num_warps": NUM_WARPS,
        **overlap.launch_options(plan.overlap),
        **keys.bounds(options, queries.q_len),
    }
    programs = triton.cdiv(head_dim_v, columns) * queries.batch * queries.q_len * heads
    return repeat.launch(fold_kernel, programs, args, constants)
