"""A part: packed query rows over some tiles of one sequence's keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import keys, load, score, softmax
from flash_decoding.kernels.rows import load_queries

if TYPE_CHECKING:
    from flash_decoding.spec import Plan

FEW_ROWS = tl.constexpr(16)
"""Rows of which each has a total for every key of a tile. Registers have no room for those of more rows, nor
beside the addresses of a tile of small pages, one for each key."""


def are_finished(plan: Plan) -> bool:
    """Whether programs that go across sequences write the results of those that they have all of.

    The reduction has nothing to do there. Tiles of many rows, and warps with roles that merge leaves, have no
    registers for two ways to write.
    """
    is_shared = plan.balanced or plan.runs > 0
    return is_shared and plan.tile.block_m == FEW_ROWS.value and not (plan.roles and plan.split_tokens)


@triton.jit
def scores_of(
    q: tl.tensor,
    k: tl.tensor,
    slots: tl.tensor,
    live: tl.tensor,
    position: tl.tensor,
    some_hidden: tl.tensor,  # whether there is a row that does not see all of the tile; True if not known
    scale: tl.tensor,
    softcap: tl.tensor,
    slopes: tl.tensor,
    alibi_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SCORES: tl.constexpr,
) -> tl.tensor:
    """Scores (rows, keys) of a tile, but for their factor; -inf where a key is not seen.

    Where nothing else is to be done to them products are added to that -inf: so all sums of a tile begin at
    once, and go on side by side. Where each is masked as it ends the assembler has been seen to make one
    after the other, in the same registers, each step waiting for the one before. (A key that some rows see
    can be anything, and is to hurt none that do not.)
    """
    if SCORES == score.FACTORED and not BOUND_LEFT and not BOUND_RIGHT and BLOCK_M < softmax.MANY_ROWS:
        sees = keys.row_sees(slots, live, position, window_left, window_right, BOUND_LEFT, BOUND_RIGHT)
        hidden = tl.where(sees, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), float("-inf"))
        scores = tl.dot(q, tl.trans(k), hidden, input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = score.transform(scores, slots, position, scale, softcap, slopes, alibi_ptr, SCORES)
        if some_hidden:
            sees = keys.row_sees(slots, live, position, window_left, window_right, BOUND_LEFT, BOUND_RIGHT)
            scores = tl.where(sees, scores, float("-inf"))
    return scores


@triton.jit
def read_part(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    key_mask_ptr: tl.tensor,
    key_mask_stride: tl.tensor,
    key_mask_columns: tl.tensor,
    cache_batch_idx_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    alibi_ptr: tl.tensor,
    alibi_strides: tl.tuple,
    sinks_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    pool_pages: tl.tensor,
    cache_rows: tl.tensor,
    table_stride: tl.tensor,
    b: tl.tensor,
    head_kv: tl.tensor,
    token: tl.tensor,  # of each row of the tile, as the next two
    head: tl.tensor,
    in_q: tl.tensor,
    q_start: tl.tensor,
    q_len: tl.tensor,
    end: tl.tensor,  # of the sequence's slots
    lo: tl.tensor,  # visible slots of the tile's rows
    hi: tl.tensor,
    first_tile: tl.tensor,
    step: tl.tensor,
    count: tl.tensor,
    is_first: tl.tensor,
    leaf: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    SCORES: tl.constexpr,
    LEAVES: tl.constexpr,
) -> tl.tuple:
    """State (peak, total, acc) of a row tile that has seen ``count`` tiles of sequence b, ``step`` apart.

    With LEAVES each ``leaf`` of them are a state of their own, merged from left to right.
    """
    cols = tl.arange(0, BLOCK_D)
    q = load_queries(q_ptr, q_strides, b, q_start, token, head, in_q, cu_seqlens_q_ptr, cols, HEAD_DIM)
    factor = score.factor(scale, SCORES)
    has_room: tl.constexpr = BLOCK_M == FEW_ROWS and PAGE_SIZE % BLOCK_N == 0
    totals: tl.constexpr = BLOCK_N if has_room else 1
    peak, total, acc = softmax.empty(BLOCK_M, totals, BLOCK_DV)
    if sinks_ptr is not None:
        if is_first:  # the sink belongs to one part, so that the merge counts it once
            peak = tl.load(sinks_ptr + head, mask=in_q, other=0.0).to(tl.float32) * softmax.LOG2E
            total += (tl.arange(0, totals) == 0).to(tl.float32)[None, :]

    if LEAVES:
        peak_split, totals_split, acc_split = softmax.empty(BLOCK_M, 1, BLOCK_DV)
        total_split = tl.sum(totals_split, 1)
        next_leaf = leaf

    position = end - q_len + token
    slopes = score.slopes(alibi_ptr, alibi_strides, b, head, in_q)
    cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
    k_base = k_ptr + tl.cast(head_kv, tl.int64) * k_strides[2]
    v_base = v_ptr + tl.cast(head_kv, tl.int64) * v_strides[2]
    lanes = tl.arange(0, BLOCK_N)
    # Many rows are work enough to leave out masks where every row sees all of a tile, and to keep the offsets
    # of a tile's keys from its first, if registers last.
    may_skip: tl.constexpr = BLOCK_M >= softmax.MANY_ROWS and BLOCK_DV <= 128 and key_mask_ptr is None
    if may_skip:
        first_clear, last_clear = keys.seen_by_all(
            position, lo, hi, window_left, window_right, BOUND_LEFT, BOUND_RIGHT
        )
    for i in tl.range(0, count):
        if LEAVES:
            if i == next_leaf:
                next_leaf += leaf
                peak_split, total_split, acc_split = softmax.fold(
                    peak_split, total_split, acc_split, *softmax.gather(peak, total, acc)
                )
                peak, total, acc = softmax.empty(BLOCK_M, totals, BLOCK_DV)
        start = (first_tile + i * step) * BLOCK_N
        slots = start + lanes
        live = (slots >= lo) & (slots < hi)
        page, slot = load.place(
            cache_row, start, lanes, hi, block_table_ptr, table_stride, pool_pages, PAGE_SIZE, BLOCK_N
        )
        if key_mask_ptr is not None:
            live &= keys.exist(key_mask_ptr, key_mask_stride, key_mask_columns, b, slots, live)
        some_hidden, k_tile, v_tile = True, k_base, v_base
        if may_skip:
            some_hidden = (start < first_clear) | (start + BLOCK_N > last_clear)
            if PAGE_SIZE == 0:
                k_tile += start.to(tl.int64) * k_strides[1]
                v_tile += start.to(tl.int64) * v_strides[1]
                slot = lanes.to(tl.int64)
        k = load.load_tile(k_tile, page, slot, live, k_strides, HEAD_DIM, BLOCK_D)
        scores = scores_of(
            q, k, slots, live, position, some_hidden, scale, softcap, slopes, alibi_ptr, window_left,
            window_right, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SCORES,
        )  # fmt: skip
        v = load.load_tile(v_tile, page, slot, live, v_strides, HEAD_DIM_V, BLOCK_DV)
        peak, total, acc = softmax.update(peak, total, acc, scores, factor, v)
    peak, total_row, acc = softmax.gather(peak, total, acc)
    if LEAVES:
        peak, total_row, acc = softmax.fold(peak_split, total_split, acc_split, peak, total_row, acc)
    return peak, total_row, acc
