"""Attention of packed query rows over a share of the keys.

FlashAttention with one split, Flash-Decoding with more:

    out_s = softmax(scores over the keys of split s) v        lse_s = log sum exp(scores)

Grid (one dimension): row tiles, key/value heads, splits, sequences, fastest first, so that programs running
together read neighbouring heads of the same tokens. A program holds BLOCK_M of the ``q_len * group`` rows
that share a key/value head: grouped query heads and query tokens are packed alike, and read each key once.

Splits are of the live keys, measured on the device: what the grid costs follows the capacity, what the
programs read follows the lengths. A split without keys writes nothing, and the combine does not look at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import ahead, arguments, keys, load, overlap, repeat
from flash_decoding.kernels.part import read_part
from flash_decoding.kernels.rows import store_split, store_state

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = [
    *("max_q_len", "new_tokens", "capacity", "pool_pages", "cache_rows", "num_splits"),
]
STRIDES = [
    "key_mask_stride",
    "key_mask_columns",
    "window_left",
    "window_right",
    "table_stride",
    "lse_sequence",
    "lse_head",
    "lse_token",
    "lse_split",
]
TABLES = [
    "cu_seqlens_q_ptr",
    "cache_seqlens_ptr",
    "cache_leftpad_ptr",
    "key_mask_ptr",
    "cache_batch_idx_ptr",
    "block_table_ptr",
]


@triton.jit
def split_and_sequence(place: tl.tensor, num_splits: tl.tensor, IS_SPLIT: tl.constexpr) -> tl.tuple:
    """Of a place among all splits of all sequences."""
    if IS_SPLIT:
        b = place // num_splits
        split = place - b * num_splits
    else:
        b = place
        split = place * 0
    return split, b


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, *TABLES])
def attend_kernel(
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
    lse_sequence: tl.tensor,
    lse_head: tl.tensor,
    lse_token: tl.tensor,
    lse_split: tl.tensor,
    num_splits: tl.tensor,
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
    IS_SPLIT: tl.constexpr,
    SPLIT_TILES: tl.constexpr,  # 0 where live keys are shared evenly
    LEAF_TILES: tl.constexpr,
    SHORT_TILES: tl.constexpr,
    BY_LEAF: tl.constexpr,
    SMALL_SPLIT_TILES: tl.constexpr,
    SMALL_SPLITS: tl.constexpr,
    STATES: tl.constexpr,
    LEAVES: tl.constexpr,
) -> None:
    if v_strides is None:
        v_strides = k_strides
    FIXED: tl.constexpr = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    row_tiles = tl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    row = pid % row_tiles * BLOCK_M
    head_kv = pid // row_tiles % HEADS_KV
    split, b = split_and_sequence(pid // (row_tiles * HEADS_KV), num_splits, IS_SPLIT)
    if OVERLAP:
        if cu_seqlens_q_ptr is None:
            ahead.ask_for_queries(
                q_ptr, q_strides, cu_seqlens_q_ptr, b, row + tl.arange(0, BLOCK_M), head_kv, 0, max_q_len,
                load.lines_of(q_ptr, BLOCK_D), GROUP, HEAD_DIM,
            )  # fmt: skip
        # Without a combine before them programs come too late to ask for anything; a tile of small pages has
        # an address for each key, and no registers left.
        if IS_SPLIT and PAGE_SIZE % BLOCK_N == 0:
            ahead.ask(
                k_ptr, v_ptr, k_strides, v_strides, cache_seqlens_ptr, cache_leftpad_ptr,
                cache_batch_idx_ptr, block_table_ptr, window_left, window_right, max_q_len, new_tokens,
                capacity, pool_pages, cache_rows, table_stride, num_splits, b, row, head_kv, split,
                tl.arange(0, BLOCK_N), load.lines_of(k_ptr, BLOCK_D), load.lines_of(v_ptr, BLOCK_DV),
                GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, FIXED,
            )  # fmt: skip
        overlap.wait_knowing(row, head_kv, split, b)
        if IS_SPLIT:  # the combine is small and can be in place early; another call had better not be
            overlap.let_the_next_kernel_start()
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if row >= q_len * GROUP:
        return
    first_tile, step, count, leaf, live_splits = keys.part_of(
        split, lo, hi, num_splits, BLOCK_N, PAGE_SIZE > 0, IS_SPLIT, FIXED
    )
    if split >= live_splits:
        return
    rows = row + tl.arange(0, BLOCK_M)
    token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
    in_q = rows < q_len * GROUP
    peak, total, acc = read_part(
        q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, key_mask_ptr, key_mask_stride,
        key_mask_columns, cache_batch_idx_ptr, block_table_ptr, cu_seqlens_q_ptr, alibi_ptr, alibi_strides,
        sinks_ptr, scale, softcap, window_left, window_right, pool_pages, cache_rows, table_stride, b,
        head_kv, token, head, in_q, q_start, q_len, end, lo, hi, first_tile, step, count, split == 0, leaf,
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT,
        SCORES, LEAVES,
    )  # fmt: skip
    cols = tl.arange(0, BLOCK_DV)
    if STATES:
        store_state(
            out_ptr, lse_ptr, peak, total, acc, q_start, token, head, in_q, cols, split, num_splits,
            HEADS_KV * GROUP, HEAD_DIM_V,
        )  # fmt: skip
    else:
        store_split(
            out_ptr, lse_ptr, (lse_sequence, lse_head, lse_token, lse_split), peak, total, acc, b, q_start,
            token, head, in_q, cols, cu_seqlens_q_ptr, split, num_splits, HEADS_KV * GROUP, HEAD_DIM_V,
        )  # fmt: skip


def launch(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int, int],
) -> repeat.Repeat | None:
    """Launch on the device of the tensors; what comes back repeats it.

    Args:
        queries: the query tokens.
        cache: the keys and values.
        options: scale, window, softcap, ALiBi, sinks.
        plan: tile and splits.
        out: contiguous (tokens, heads_q, num_splits, head_dim_v), of the dtype to write.
        lse: where the log-sum-exps go, or None; with several parts of a fixed size contiguous (tokens,
            heads_q, num_splits, 2), for the peaks and totals of states.
        lse_strides: of lse, for (sequence, head, token, split).
    """
    programs, args = grid_and_arguments(
        queries, cache, options, plan, out=out, lse=lse, lse_strides=lse_strides
    )
    compiled_for = arguments.constants(queries, cache, options, plan) | arguments.of_parts(plan)
    return repeat.launch(attend_kernel, programs, args, compiled_for)


def grid_and_arguments(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int, int],
) -> tuple[int, tuple[object, ...]]:
    """Programs of a kernel of even splits, and what it takes but for constants; as :func:`launch` has it."""
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.num_splits * queries.batch
    first = arguments.inputs(queries, cache, options, out, lse)
    return programs, (*first, *lse_strides, plan.num_splits)
