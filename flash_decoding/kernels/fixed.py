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

from flash_decoding.kernels import attend, balanced, fixed_sizes, keys, overlap, repeat, runs, whole
from flash_decoding.kernels.part import FEW_ROWS, read_part
from flash_decoding.kernels.rows import store_state

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


# What changes from call to call must not choose the compiled kernel (contract C6).
@triton.jit(do_not_specialize=[*balanced.UNSPECIALISED, "num_splits", "split_tiles", "leaf_tiles"])
def attend_fixed_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    q_strides: tl.tuple,  # token of the batch, token, head
    k_strides: tl.tuple,  # page, slot, head
    v_strides: tl.tuple,
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
    split_tiles: tl.tensor,
    leaf_tiles: tl.tensor,
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
    SOFTCAP: tl.constexpr,
    OVERLAP: tl.constexpr,
    LEAVES: tl.constexpr,
) -> None:
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    row_tiles = tl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    head_kv = pid // row_tiles % HEADS_KV
    row = pid % row_tiles * BLOCK_M
    if BLOCK_M != FEW_ROWS:
        rows = row + tl.arange(0, BLOCK_M)
        token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
    b, split, left = whole.find(
        pid // (row_tiles * HEADS_KV), num_runs, row, batch, cache_seqlens_ptr, cache_leftpad_ptr,
        cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left, window_right, num_splits, split_tiles,
        leaf_tiles, 0, tl.arange(0, runs.BATCH), GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
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
        size, leaf, splits = fixed_sizes.share(tiles, num_splits, split_tiles, leaf_tiles, 0)
        has_rows = row < q_len * GROUP  # a short query may have none here: then nothing is read or written
        first_tile, count = fixed_sizes.hand_of(split, origin, tl.where(has_rows, tiles, 0), size)
        in_q = rows < q_len * GROUP
        peak, total, acc = read_part(
            q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, key_mask_ptr, key_mask_stride,
            key_mask_columns, cache_batch_idx_ptr, block_table_ptr, cu_seqlens_q_ptr, alibi_ptr,
            alibi_strides, sinks_ptr, scale, softcap, window_left, window_right, pool_pages, cache_rows,
            table_stride, b, head_kv, token, head, in_q, q_start, q_len, end, lo, hi, first_tile, 1,
            count, split == 0, leaf, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT, SOFTCAP, LEAVES,
        )  # fmt: skip
        flat_row = ((q_start + token) * (HEADS_KV * GROUP) + head) * num_splits + split
        store_state(out_ptr, lse_ptr, peak, total, acc, flat_row, in_q, tl.arange(0, BLOCK_DV), HEAD_DIM_V)
        left -= has_rows.to(tl.int32)
        is_last = (split + 1 >= splits) | (row >= q_len * GROUP)
        b += is_last.to(tl.int32)
        split = tl.where(is_last, 0, split + 1)


def launch(
    queries: Queries, cache: KVCache, options: Options, plan: Plan, *, parts: Tensor, part_lse: Tensor
) -> repeat.Repeat | None:
    """Launch on the device of the tensors; what comes back repeats it.

    Args:
        queries: the query tokens.
        cache: the keys and values.
        options: scale, window, softcap, ALiBi, sinks.
        plan: tile, splits and their size, and ``runs``.
        parts: contiguous (tokens, heads_q, num_splits, head_dim_v) fp32.
        part_lse: contiguous (tokens, heads_q, num_splits, 2) fp32, for peaks and totals.
    """
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.runs
    split_tiles, leaf_tiles, _ = fixed_sizes.arguments(plan)
    sizes = (queries.batch, plan.runs, plan.num_splits, split_tiles, leaf_tiles)
    args = (*attend.inputs(queries, cache, options, parts, part_lse), *sizes)
    constants = attend.constants(queries, cache, options, plan) | {"LEAVES": plan.leaf_tokens > 0}
    return repeat.launch(attend_fixed_kernel, programs, args, constants)
