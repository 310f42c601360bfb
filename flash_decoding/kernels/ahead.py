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

from flash_decoding.kernels import keys, load, runs
from flash_decoding.kernels.load import VIA_L2

FEW_TILES = tl.constexpr(4)
"""Splits of so many tiles ask for all of their first one. Longer ones ask for its first key: more of them at
once would only make their first tiles arrive together, and late."""

SLOTS_OF_A_RUN = tl.constexpr(64)
"""Slots that a run asks for: looking for where it begins takes time, in which the memory would do nothing."""


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
    """Ask for keys and values of one head, by page (or row of the cache) and slots in it."""
    head = tl.cast(head_kv, tl.int64)
    load.prefetch(k_ptr + head * k_strides[2], page * k_strides[0] + slots * k_strides[1], k_lines, HEAD_DIM)
    load.prefetch(
        v_ptr + head * v_strides[2], page * v_strides[0] + slots * v_strides[1], v_lines, HEAD_DIM_V
    )


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
    split_tiles: tl.tensor,
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
) -> None:
    """Ask for what a split of sequence b reads first, as far as can be told."""
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT, VIA_L2,
    )  # fmt: skip
    origin, tiles, live_splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK_N)
    first_tile, _, count = keys.hand_of(split, origin, tiles, live_splits, split_tiles, PAGE_SIZE > 0)
    if (split < live_splits) & (count > 0):
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
    window_left: tl.tensor,
    window_right: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    cache_rows: tl.tensor,
    batch: tl.tensor,
    run: tl.tensor,
    num_runs: tl.tensor,
    head_kv: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """Where a run begins as far as can be told, and ask for what it reads first.

    Returns:
        As :func:`runs.find`, of ``runs.BATCH`` sequences at most; and their tiles, from which it follows.
    """
    lanes = tl.arange(0, runs.BATCH)
    origins, tiles = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA_L2,
    )  # fmt: skip
    b, before, size, all_tiles, extra = runs.find_among_few(run, num_runs, batch, lanes, tiles, BLOCK_N)
    if PAGE_SIZE == 0:
        origin = tl.sum(tl.where(lanes == b, origins, 0), 0)
        first = runs.tile_at(origin, run * size - before, extra) * BLOCK_N
        slots = tl.minimum(first + tl.arange(0, SLOTS_OF_A_RUN), capacity - 1).to(tl.int64)
        row = load.cache_row(tl.minimum(b, batch - 1), cache_batch_idx_ptr, cache_rows, VIA_L2)
        ask_for(
            k_ptr, v_ptr, k_strides, v_strides, row, slots, head_kv, load.lines_of(k_ptr, BLOCK_D),
            load.lines_of(v_ptr, BLOCK_DV), HEAD_DIM, HEAD_DIM_V,
        )  # fmt: skip
    return b, before, size, all_tiles, extra, tiles
