"""Asking for a split's first keys and values while the kernel before still runs.

A program in place early (:mod:`~flash_decoding.kernels.overlap`) could wait and do nothing. Instead it has
the memory bring lengths, table entries and first keys on their way into the L2 cache, so that neither they
nor the translations of their addresses are waited for later. What it asks for is a guess: the kernel before
may be about to change the lengths, or the keys. A wrong guess costs a request, never a result: nothing that
is read here is kept, in registers or in the multiprocessor's own cache, and the L2 cache is the memory's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import keys, load, run_parts, runs
from flash_decoding.kernels.load import VIA_L2

ASKED_BITS = tl.constexpr(8 * (32 << 10))
"""What a program asks for, about: keys of a first tile, and values where both are no more. With more of it
first tiles come late, and last ones together."""

FEW_TILES = tl.constexpr(4)
"""Splits of so many tiles of pages ask for a first tile, longer ones for its first key: there are two
programs on a multiprocessor."""

SLOTS_OF_A_RUN, SLOTS_OF_A_PAGE = tl.constexpr(64), tl.constexpr(16)
"""Slots that a run asks for, and those of a page: looking for where it begins takes time, in which the memory
would do nothing."""


@triton.jit
def ask_for(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    page: tl.tensor,
    slots: tl.tensor,
    head_kv: tl.tensor,
    k_lines: tl.tensor,
    v_lines: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Ask for keys of one head, and for values if that is not too much, by page (or row) and slots in it."""
    head = tl.cast(head_kv, tl.int64)
    load.prefetch(k_ptr + head * k_strides[2], page * k_strides[0] + slots * k_strides[1], k_lines, HEAD_DIM)
    bits: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth
    if slots.shape[0] * (HEAD_DIM + HEAD_DIM_V) * bits <= ASKED_BITS:
        v_rows = page * v_strides[0] + slots * v_strides[1]
        load.prefetch(v_ptr + head * v_strides[2], v_rows, v_lines, HEAD_DIM_V)


@triton.jit
def ask_for_queries(
    q_ptr: tl.tensor,
    strides: tl.tuple,
    cu_seqlens_q_ptr: tl.tensor,
    b: tl.tensor,
    rows: tl.tensor,
    head_kv: tl.tensor,
    q_start: tl.tensor,
    q_len: tl.tensor,
    lines: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> None:
    """Ask for some query rows, which a program waits for before anything else."""
    rows = tl.minimum(rows, tl.maximum(q_len * GROUP, 1) - 1)
    token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
    base = q_ptr + tl.cast(b, tl.int64) * strides[0]
    if cu_seqlens_q_ptr is not None:
        base += q_start * strides[1]
    load.prefetch(base, token.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2], lines, HEAD_DIM)


@triton.jit
def ask(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cache_batch_idx_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    pool_pages: tl.tensor,
    cache_rows: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    b: tl.tensor,
    row: tl.tensor,
    head_kv: tl.tensor,
    split: tl.tensor,
    lanes: tl.tensor,  # 0 to BLOCK_N
    k_lines: tl.tensor,  # 0 to the lines of a key, as the next of a value
    v_lines: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    FIXED: tl.constexpr,
) -> None:
    """Ask for what a split of sequence b reads first, as far as can be told."""
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT, VIA_L2,
    )  # fmt: skip
    first_tile, _, count, _, live_splits = keys.part_of(
        split, lo, hi, num_splits, BLOCK_N, PAGE_SIZE > 0, True, FIXED
    )
    if (split < live_splits) & (count > 0):
        if PAGE_SIZE > 0:
            lanes = tl.where(count <= FEW_TILES, lanes, 0)
        lanes = tl.maximum(tl.minimum(lanes, hi - 1 - first_tile * BLOCK_N), 0)
        cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows, VIA_L2)
        page, slot = load.place(
            cache_row, first_tile * BLOCK_N, lanes, hi, block_table_ptr, table_stride, pool_pages, PAGE_SIZE,
            BLOCK_N, VIA_L2,
        )  # fmt: skip
        ask_for(
            k_ptr, v_ptr, k_strides, v_strides, page, slot, head_kv, k_lines, v_lines, HEAD_DIM, HEAD_DIM_V
        )


@triton.jit
def find_run(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    cache_batch_idx_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    pool_pages: tl.tensor,
    cache_rows: tl.tensor,
    table_stride: tl.tensor,
    batch: tl.tensor,
    run: tl.tensor,
    num_runs: tl.tensor,
    head_kv: tl.tensor,
    lanes: tl.tensor,  # 0 to runs.BATCH
    asked: tl.tensor,  # 0 to the slots that are asked for
    k_lines: tl.tensor,
    v_lines: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """Where a run begins as far as can be told, and ask for what it reads first.

    Returns:
        As :func:`runs.find`, of ``runs.BATCH`` sequences at most; and their tiles, from which it follows.
    """
    origins, tiles = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA_L2,
    )  # fmt: skip
    b, before, size, all_tiles, extra = runs.find_early(
        run, num_runs, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens,
        capacity, window_left, window_right, lanes, tiles, tl.arange(0, runs.FEW), GROUP, BLOCK_N, BOUND_LEFT,
        BOUND_RIGHT, VIA_L2,
    )  # fmt: skip
    if PAGE_SIZE % SLOTS_OF_A_PAGE == 0:
        origin, own = tl.sum(tl.where(lanes == b, origins, 0), 0), tl.sum(tl.where(lanes == b, tiles, 0), 0)
        behind = before + own + extra
        until = tl.minimum((run + 1) * size, behind)
        first, _, _ = run_parts.hand_of(
            run * size, until, before, behind, size, extra, origin, origin, origin + own, PAGE_SIZE > 0
        )
        start = tl.minimum(first * BLOCK_N, capacity - 1)
        lanes = tl.minimum(start + asked, capacity - 1) - start
        row = load.cache_row(tl.minimum(b, batch - 1), cache_batch_idx_ptr, cache_rows, VIA_L2)
        page, slots = load.place(
            row, start, lanes, capacity, block_table_ptr, table_stride, pool_pages, PAGE_SIZE,
            asked.shape[0], VIA_L2,
        )  # fmt: skip
        ask_for(
            k_ptr, v_ptr, k_strides, v_strides, page, slots, head_kv, k_lines, v_lines, HEAD_DIM, HEAD_DIM_V
        )
    return b, before, size, all_tiles, extra, tiles
