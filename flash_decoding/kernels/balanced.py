"""Attention with the same work for every program, across sequences of any lengths.

The parts are those of :mod:`~flash_decoding.kernels.part`, as in the kernel with even splits; who reads which
is decided by :mod:`~flash_decoding.kernels.runs`. Parts go to scratch, where the combine finds them; a part
that is all of its sequence is the result, and the combine has nothing to do there.

Grid (one dimension): row tiles, key/value heads, runs, fastest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import ahead, arguments, attend, load, overlap, repeat, run_parts, runs
from flash_decoding.kernels.part import are_finished, read_part
from flash_decoding.kernels.rows import store_final, store_part

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

# What changes from call to call must not choose the compiled kernel (contract C6).
UNSPECIALISED = [
    *("max_q_len", "new_tokens", "capacity", "pool_pages", "cache_rows", "batch", "num_runs"),
    *("key_mask_stride", "key_mask_columns", "window_left", "window_right", "table_stride"),
    *("lse_sequence", "lse_head", "lse_token"),
    *attend.TABLES,
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def attend_balanced_kernel(
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
    final_ptr: tl.tensor,  # the results of whole sequences, and their LSEs
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
    FINISHES: tl.constexpr,
) -> None:
    if v_strides is None:
        v_strides = k_strides
    row_tiles = tl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    head_kv = pid // row_tiles % HEADS_KV
    row = pid % row_tiles * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    token, head = rows // GROUP, head_kv * GROUP + rows % GROUP
    run = pid // (row_tiles * HEADS_KV)
    lanes = tl.arange(0, runs.BATCH)
    if OVERLAP:
        slots: tl.constexpr = ahead.SLOTS_OF_A_PAGE if PAGE_SIZE > 0 else ahead.SLOTS_OF_A_RUN
        b, before, size, all_tiles, extra, early = ahead.find_run(
            k_ptr, v_ptr, k_strides, v_strides, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
            cache_batch_idx_ptr, block_table_ptr, window_left, window_right, max_q_len, new_tokens, capacity,
            pool_pages, cache_rows, table_stride, batch, run, num_runs, head_kv, lanes, tl.arange(0, slots),
            load.lines_of(k_ptr, BLOCK_D), load.lines_of(v_ptr, BLOCK_DV), GROUP, HEAD_DIM, HEAD_DIM_V,
            BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    _, now = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if not OVERLAP:
        early = now
        b, before, size, all_tiles, extra = runs.find_among_few(run, num_runs, batch, lanes, now, BLOCK_N)
    # What was found early holds, unless the kernel before changed a length.
    if (batch > runs.BATCH) | (tl.max((now != early).to(tl.int32), 0) > 0):
        b, before, size, all_tiles, extra = runs.find(
            run, num_runs, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, lanes, now, True, GROUP, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
    at = run * size
    stop = tl.minimum(at + size, all_tiles)
    while at < stop:
        q_start, q_len, end, lo, hi, first_tile, step, count, until, behind = run_parts.part_at(
            at, b, before, size, extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr,
            cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left, window_right, GROUP, BLOCK_M,
            BLOCK_N, BOUND_LEFT, BOUND_RIGHT, PAGE_SIZE > 0,
        )  # fmt: skip
        in_q = rows < q_len * GROUP
        peak, total, acc = read_part(
            q_ptr, k_ptr, v_ptr, q_strides, k_strides, v_strides, key_mask_ptr, key_mask_stride,
            key_mask_columns, cache_batch_idx_ptr, block_table_ptr, cu_seqlens_q_ptr, alibi_ptr,
            alibi_strides, sinks_ptr, scale, softcap, window_left, window_right, pool_pages, cache_rows,
            table_stride, b, head_kv, token, head, in_q, q_start, q_len, end, lo, hi, first_tile, step,
            count, at == before, 0, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT, SCORES, False,
        )  # fmt: skip
        cols = tl.arange(0, BLOCK_DV)
        if (at == before) & (until == behind) & FINISHES:
            store_final(
                final_ptr, final_lse_ptr, (lse_sequence, lse_head, lse_token), peak, total, acc, b, q_start,
                token, head, in_q, cols, cu_seqlens_q_ptr, HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
        else:
            store_part(
                out_ptr, lse_ptr, peak, total, acc, run + b, max_q_len, token, head, in_q, cols,
                HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
        at = until
        before = behind
        b += 1


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
        plan: tile, and ``num_splits`` runs.
        parts: contiguous (num_splits + batch - 1, q_len, heads_q, head_dim_v) fp32.
        part_lse: contiguous (num_splits + batch - 1, q_len, heads_q) fp32.
        out: contiguous (tokens, heads_q, head_dim_v), for sequences that a run has all of.
        lse: where the log-sum-exps of such go, or None.
        lse_strides: of lse, for (sequence, head, token).
    """
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.num_splits
    first = arguments.inputs(queries, cache, options, parts, part_lse)
    args = (*first, queries.batch, plan.num_splits, out, lse, *lse_strides)
    constants = arguments.constants(queries, cache, options, plan) | {"FINISHES": are_finished(plan)}
    return repeat.launch(attend_balanced_kernel, programs, args, constants)
