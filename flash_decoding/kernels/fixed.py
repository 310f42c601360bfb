"""Attention in splits of a fixed size, with the same work for every program, across sequences of any lengths.

Which keys a split has, and where it lies in scratch, is as in the kernel of even splits
(:mod:`~flash_decoding.kernels.attend`), bit for bit: the combine cannot tell, and a batch may grow from one
kernel to the other. But there each split has a program, live or not; here there are as many programs as run
at once, and :mod:`~flash_decoding.kernels.whole` says which splits each of them reads.

Grid (one dimension): row tiles, key/value heads, runs, fastest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import arguments, balanced, fixed_sizes, keys, overlap, repeat, runs, whole
from flash_decoding.kernels.load import VIA_L2
from flash_decoding.kernels.part import FEW_ROWS, are_finished, read_part
from flash_decoding.kernels.rows import store_final, store_state

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


@triton.jit
def begin(
    run: tl.tensor,
    num_runs: tl.tensor,
    row: tl.tensor,
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
    FIXED: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> tl.tuple:
    """Wait for the kernel before, and tell the share of a run as :func:`whole.find` does."""
    lanes = tl.arange(0, runs.BATCH)
    if OVERLAP:
        _, early = runs.tiles_of(
            lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
            capacity, window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA_L2,
        )  # fmt: skip
        b, split, left = whole.find_early(
            run, num_runs, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, lanes, tl.arange(0, runs.FEW), GROUP,
            BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED, VIA_L2,
        )  # fmt: skip
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    _, now = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if not OVERLAP:
        early = now - 1  # nothing was found
        b, split, left = 0, 0, 0
    # What was found early holds, unless the kernel before changed a length.
    if (batch > runs.BATCH) | (tl.max((now != early).to(tl.int32), 0) > 0):
        b, split, left = whole.find(
            run, num_runs, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, lanes, GROUP, BLOCK_M, BLOCK_N,
            BOUND_LEFT, BOUND_RIGHT, FIXED,
        )  # fmt: skip
    return b, split, left


# What changes from call to call must not choose the compiled kernel (contract C6).
@triton.jit(do_not_specialize=[*balanced.UNSPECIALISED, "num_splits"])
def attend_fixed_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_strides: tl.tuple,  # token of the batch, token, head
    k_strides: tl.tuple,  # page, slot, head
    v_strides: tl.tuple,  # None: as those of keys
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    key_mask_ptr: tl.tensor,
    key_mask_stride: tl.tensor,  # None, as the columns, without a mask: nothing of it is compiled in then
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
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    pool_pages: tl.tensor,
    cache_rows: tl.tensor,
    table_stride: tl.tensor,
    batch: tl.tensor,
    num_runs: tl.tensor,
    num_splits: tl.tensor,
    final_ptr: tl.tensor,  # the results of sequences of a single split, and their LSEs
    final_lse_ptr: tl.tensor,
    lse_sequence: tl.tensor,
    lse_head: tl.tensor,
    lse_token: tl.tensor,
    HEADS_KV: tl.constexpr,
    GROUP: tl.constexpr,
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
    OVERLAP: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    LEAF_TILES: tl.constexpr,
    SHORT_TILES: tl.constexpr,
    BY_LEAF: tl.constexpr,
    SMALL_SPLIT_TILES: tl.constexpr,
    SMALL_SPLITS: tl.constexpr,
    LEAVES: tl.constexpr,
    FINISHES: tl.constexpr,
) -> None:
    if v_strides is None:
        v_strides = k_strides
    FIXED: tl.constexpr = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    row_tiles = tl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    head_kv = pid // row_tiles % HEADS_KV
    row = pid % row_tiles * BLOCK_M
    if BLOCK_M != FEW_ROWS:
        rows = row + tl.arange(0, BLOCK_M)
        token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
    b, split, left = begin(
        pid // (row_tiles * HEADS_KV), num_runs, row, batch, cache_seqlens_ptr, cache_leftpad_ptr,
        cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left, window_right, num_splits, GROUP,
        BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED, OVERLAP,
    )  # fmt: skip
    while left > 0:
        if BLOCK_M == FEW_ROWS:  # carried from split to split they take registers that leaves need
            rows = row + tl.arange(0, BLOCK_M)
            token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
        q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
        end, lo, hi = keys.seen_by(
            b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left,
            window_right, GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        origin, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
        size = fixed_sizes.sizes(tiles, FIXED)
        parts = fixed_sizes.parts_of(size, num_splits, FIXED)
        first_tile, step, count = fixed_sizes.hand_of(split, origin, size, PAGE_SIZE > 0, FIXED)
        has_rows = row < q_len * GROUP  # a short query may have none here: then nothing is read or written
        count = tl.where(has_rows, count, 0)
        in_q = rows < q_len * GROUP
        peak, total, acc = read_part(
            q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, key_mask_ptr, key_mask_stride,
            key_mask_columns, cache_batch_idx_ptr, block_table_ptr, cu_seqlens_q_ptr, alibi_ptr,
            alibi_strides, sinks_ptr, scale, softcap, window_left, window_right, pool_pages, cache_rows,
            table_stride, b, head_kv, token, head, in_q, q_start, q_len, end, lo, hi, first_tile, step,
            count, split == 0, size[4], HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT, SCORES, LEAVES,
        )  # fmt: skip
        cols = tl.arange(0, BLOCK_DV)
        if (parts == 1) & FINISHES:
            store_final(
                final_ptr, final_lse_ptr, (lse_sequence, lse_head, lse_token), peak, total, acc, b, q_start,
                token, head, in_q, cols, cu_seqlens_q_ptr, HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
        else:
            store_state(
                out_ptr, lse_ptr, peak, total, acc, q_start, token, head, in_q, cols, split, num_splits,
                HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
        left -= has_rows.to(tl.int32)
        is_last = (split + 1 >= parts) | (row >= q_len * GROUP)
        b += is_last.to(tl.int32)
        split = tl.where(is_last, 0, split + 1)


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
    """Launch on the device of the tensors; what comes back repeats it.

    Args:
        queries: the query tokens.
        cache: the keys and values.
        options: scale, window, softcap, ALiBi, sinks.
        plan: tile, splits and their size, and ``runs``.
        parts: contiguous (tokens, heads_q, num_splits, head_dim_v) fp32.
        part_lse: contiguous (tokens, heads_q, num_splits, 2) fp32, for peaks and totals.
        out: contiguous (tokens, heads_q, head_dim_v), for sequences of a single split.
        lse: where the log-sum-exps of such go, or None.
        lse_strides: of lse, for (sequence, head, token).
    """
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.runs
    sizes = (queries.batch, plan.runs, plan.num_splits)
    args = (*arguments.inputs(queries, cache, options, parts, part_lse), *sizes, out, lse, *lse_strides)
    kinds = {"LEAVES": fixed_sizes.merges_leaves(plan), "FINISHES": are_finished(plan)}
    constants = arguments.constants(queries, cache, options, plan) | fixed_sizes.constants(plan) | kinds
    return repeat.launch(attend_fixed_kernel, programs, args, constants)
