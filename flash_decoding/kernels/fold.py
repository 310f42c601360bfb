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

from flash_decoding.kernels import arguments, fixed_sizes, keys, overlap, repeat, softmax
from flash_decoding.kernels.rows import lse_offset
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

LANES = tl.constexpr(8)
"""Splits merged at a time. It tells the order of sums, so no size may change it."""

FEW_PARTS = 32
PARTS_AHEAD = (2, FEW_PARTS + 1)
"""Numbers of parts that are merged by kernels that differ."""

FEW, MANY = (64, 2), (16, 8)
"""Columns of a program, and how many parts of each lane are on their way together: for rows of few parts, of
which there are many, and for rows of many parts or of leaves. Programs are to find places beside those of the
attention kernel, all at once if possible."""

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = [
    *("heads", "max_q_len", "new_tokens", "capacity", "window_left", "window_right"),
    *("lse_sequence", "lse_head", "lse_token", "num_parts"),
]
TABLES = ["cu_seqlens_q_ptr", "cache_seqlens_ptr", "cache_leftpad_ptr"]


@triton.jit
def lanes_of(
    lo: tl.tensor,
    hi: tl.tensor,
    num_parts: tl.tensor,
    BLOCK_N: tl.constexpr,
    FIXED: tl.constexpr,
) -> tl.tuple:
    """How many parts were written of [lo, hi); of each lane its first part, and how many it merges; the most
    that one does; and whether these lie in a row.

    Either a lane has one split, of several leaves that do, or splits LANES apart that are a part each.
    """
    tl.static_assert(fixed_sizes.LEAFY_SPLITS <= LANES, "a lane merges the leaves of one split, or splits")
    _, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
    size = fixed_sizes.sizes(tiles, FIXED)
    twofold, _, _, leaves, _ = size
    live = fixed_sizes.parts_of(size, num_parts, FIXED)
    lanes = tl.arange(0, LANES)
    in_a_row = twofold < 0  # never, which the compiler sees: parts that are splits have one way
    first = lanes
    if FIXED[3]:
        in_a_row = 1 << twofold <= LANES
        first = tl.where(in_a_row, lanes * leaves, lanes)
    left = tl.maximum(live - first, 0)
    left = tl.where(in_a_row, tl.minimum(left, leaves), tl.cdiv(left, LANES))
    count = tl.where(in_a_row, leaves, tl.cdiv(live, LANES))
    return live, first, left, count, in_a_row


@triton.jit
def load_states(
    parts: tl.tensor,  # of each lane, as the next two
    sums: tl.tensor,
    live: tl.tensor,
    part: tl.constexpr,
    cols: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
) -> tl.tuple:
    """States of a part for each lane; empty where there is none."""
    peak = tl.load(sums + part * 2, mask=live, other=float("-inf"))
    total = tl.load(sums + part * 2 + 1, mask=live, other=0.0)
    mask = live[:, None] & (cols < HEAD_DIM_V)[None, :]
    acc = tl.load(parts[:, None] + (cols + part * HEAD_DIM_V)[None, :], mask=mask, other=0.0)
    return peak, total, acc


@triton.jit
def merge_lanes(
    parts: tl.tensor,  # of the row the first, as the next
    sums: tl.tensor,
    first: tl.tensor,  # of each lane, as the next
    left: tl.tensor,
    count: tl.tensor,
    cols: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
    ALONG: tl.constexpr,  # from a lane's part to its next
    AT_ONCE: tl.constexpr,
) -> tl.tuple:
    """State of a row, from lanes that each take their parts in one by one; ``count`` is the most of these."""
    parts, sums = parts + first * HEAD_DIM_V, sums + first * 2
    lanes: tl.constexpr = first.shape[0]
    peak, total = tl.full((lanes,), float("-inf"), tl.float32), tl.zeros((lanes,), tl.float32)
    acc = tl.zeros((lanes, cols.shape[0]), tl.float32)
    for _ in range(0, count, AT_ONCE):
        given = ()
        for i in tl.static_range(AT_ONCE):
            state = load_states(parts, sums, i < left, i * ALONG, cols, HEAD_DIM_V)
            given = given + (state,)  # type: ignore[assignment]  # noqa: RUF005 - as Triton has it
        for i in tl.static_range(AT_ONCE):
            peak, total, acc = softmax.fold(peak, total, acc, *given[i])
        parts += AT_ONCE * ALONG * HEAD_DIM_V
        sums += AT_ONCE * ALONG * 2
        left -= AT_ONCE
    return softmax.join(peak, total, acc)


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
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    LEAF_TILES: tl.constexpr,
    SHORT_TILES: tl.constexpr,
    BY_LEAF: tl.constexpr,
    SMALL_SPLIT_TILES: tl.constexpr,
    SMALL_SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
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
    row = (token * GROUP + head % GROUP) // BLOCK_M * BLOCK_M
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    FIXED: tl.constexpr = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    live, first, left, count, in_a_row = lanes_of(lo, hi, num_parts, BLOCK_N, FIXED)
    if FINISHED:
        if live == 1:
            overlap.wait_in_first_program(OVERLAP)
            return
    flat_row = (q_start + token) * heads + head
    if OVERLAP:
        overlap.wait_knowing(flat_row, live, count, in_a_row)
    parts = parts_ptr + flat_row * num_parts * HEAD_DIM_V
    sums = part_lse_ptr + flat_row * num_parts * 2
    cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    if BY_LEAF and live == count:
        only = tl.arange(0, 1)  # a lane: most have no part here, but their share of the work
        peak, total, acc = merge_lanes(parts, sums, only, live + only, count, cols, HEAD_DIM_V, 1, AT_ONCE)
    elif in_a_row:
        peak, total, acc = merge_lanes(parts, sums, first, left, count, cols, HEAD_DIM_V, 1, AT_ONCE)
    else:
        peak, total, acc = merge_lanes(parts, sums, first, left, count, cols, HEAD_DIM_V, LANES, AT_ONCE)

    out = softmax.output(acc, total, BLOCK_M).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + flat_row * HEAD_DIM_V + cols, out, mask=cols < HEAD_DIM_V)
    if lse_ptr is not None and block == 0:
        strides = (lse_sequence, lse_head, lse_token)
        lse = lse_ptr + lse_offset(strides, b, q_start, token, head, cu_seqlens_q_ptr)
        tl.store(lse, softmax.log_sum_exp(peak, total))


def block_of(plan: Plan, head_dim_v: int) -> tuple[int, int]:
    """Columns of a program, and parts of a lane at a time."""
    columns, at_once = MANY if plan.by_leaf or plan.num_splits > FEW_PARTS else FEW
    return min(columns, padded(head_dim_v)), at_once


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
    columns, at_once = block_of(plan, head_dim_v)
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
    )
    constants = {
        "BLOCK_COLS": columns,
        "AT_ONCE": at_once,
        **fixed_sizes.constants(plan),
        **arguments.of_reduction(queries, cache, options, plan, head_dim_v),
    }
    programs = triton.cdiv(head_dim_v, columns) * queries.batch * queries.q_len * heads
    return repeat.launch(fold_kernel, programs, args, constants)
