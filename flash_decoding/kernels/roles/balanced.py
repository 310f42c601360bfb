"""Warps with roles, equal runs across sequences: as in :mod:`flash_decoding.kernels.balanced`.

Loaders and multipliers go along the parts of a run each for themselves, by the same function; loaders are
ahead, so that a change of sequences costs the memory nothing.

Grid (one dimension): row tiles, key/value heads, runs, fastest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import attend, balanced, keys, load, overlap, repeat, runs, softmax
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.attend import constants
from flash_decoding.kernels.roles.loading import load_part
from flash_decoding.kernels.roles.multiplying import MULTIPLIERS, multiply_part, product_layout, rows_of
from flash_decoding.kernels.rows import store_out

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


@gluon.jit
def part_at(
    at,
    b,
    before,
    extra,
    stop,
    row,
    batch,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    cu_seqlens_q_ptr,
    max_q_len,
    new_tokens,
    capacity,
    window_left,
    window_right,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
):
    """The part of sequence b that begins at ``at``.

    Returns:
        Its queries' first token and number; end of the sequence's slots and [lo, hi) of those that are seen;
        its first tile and how many; where it ends, and where the sequence does.
    """
    origin, tiles = runs.tiles_of(
        b, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    behind = before + tiles + extra
    until = gl.minimum(behind, stop)
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    first = gl.maximum(runs.tile_at(origin, at - before, extra), lo // BLOCK_N)
    last = gl.minimum(runs.tile_at(origin, until - before, extra), gl.cdiv(hi, BLOCK_N))
    return q_start, q_len, end, lo, hi, first, gl.maximum(last - first, 0), until, behind


@gluon.jit
def load_run(
    k_base,
    v_base,
    k_strides,
    v_strides,
    k_ring,
    v_ring,
    k_barriers,
    v_barriers,
    block_table_ptr,
    table_stride,
    pool_pages,
    cache_batch_idx_ptr,
    cache_rows,
    at,
    b,
    before,
    extra,
    stop,
    row,
    batch,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    cu_seqlens_q_ptr,
    max_q_len,
    new_tokens,
    capacity,
    window_left,
    window_right,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
):
    """Load what a run reads, part after part."""
    turn = 0
    while at < stop:
        _, _, _, lo, hi, first, count, until, behind = part_at(
            at, b, before, extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, window_left, window_right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
        cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
        turn = load_part(
            k_base, v_base, k_strides, v_strides, k_ring, v_ring, k_barriers, v_barriers, block_table_ptr,
            table_stride, pool_pages, cache_row, lo, hi, first, 1, count, turn, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, PAGE_SIZE, STAGES, LOADERS,
        )  # fmt: skip
        at = until
        before = behind
        b += 1


@gluon.jit
def multiply_run(
    q_ptr,
    q_strides,
    out_ptr,
    lse_ptr,
    alibi_ptr,
    alibi_strides,
    sinks_ptr,
    scale,
    softcap,
    k_ring,
    v_ring,
    k_barriers,
    v_barriers,
    run,
    head_kv,
    at,
    b,
    before,
    extra,
    stop,
    row,
    batch,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    cu_seqlens_q_ptr,
    max_q_len,
    new_tokens,
    capacity,
    window_left,
    window_right,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Multiply what the loaders load, and write each part's result to scratch."""
    acc_in: gl.constexpr = product_layout(BLOCK_M, BLOCK_DV)
    cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, acc_in))
    turn = 0
    while at < stop:
        q_start, q_len, end, lo, hi, first, count, until, behind = part_at(
            at, b, before, extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, window_left, window_right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
        peak, total, acc = multiply_part(
            q_ptr, q_strides, cu_seqlens_q_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
            window_left, window_right, k_ring, v_ring, k_barriers, v_barriers, b, head_kv, row, q_start,
            q_len, end, lo, hi, first, 1, count, at == before, turn, GROUP, HEAD_DIM, BLOCK_D, BLOCK_DV,
            BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES,
        )  # fmt: skip
        turn += count
        token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, acc_in))
        part_row = ((run + b).to(gl.int64) * max_q_len + token) * (HEADS_KV * GROUP) + head
        store_out(out_ptr, acc / softmax.denominator(total)[:, None], part_row, in_q, cols, HEAD_DIM_V)
        gl.store(lse_ptr + part_row, softmax.log_sum_exp(peak, total), mask=in_q)
        at = until
        before = behind
        b += 1


@gluon.jit(do_not_specialize=balanced.UNSPECIALISED)
def balanced_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_strides,  # token of the batch, token, head
    k_strides,  # page, slot, head
    v_strides,
    cache_seqlens_ptr,
    cache_leftpad_ptr,
    key_mask_ptr,  # always None, as the next two: the planner leaves masks to the portable kernel
    key_mask_stride,
    key_mask_columns,
    cache_batch_idx_ptr,
    block_table_ptr,
    cu_seqlens_q_ptr,
    alibi_ptr,
    alibi_strides,
    sinks_ptr,
    scale,
    softcap,
    window_left,
    window_right,
    max_q_len,
    new_tokens,
    capacity,
    pool_pages,
    cache_rows,
    table_stride,
    batch,
    num_runs,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    OVERLAP: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    GUESS: gl.constexpr,
):
    k_ring, v_ring, k_barriers, v_barriers = ring.make(
        k_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, STAGES, LOADERS
    )
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = gl.program_id(0)
    row = pid % row_tiles * BLOCK_M
    head_kv = pid // row_tiles % HEADS_KV
    run = pid // (row_tiles * HEADS_KV)
    each_warp: gl.constexpr = gl.BlockedLayout([runs.BATCH // 32], [32], [MULTIPLIERS], [0])
    lanes = gl.arange(0, runs.BATCH, each_warp)  # every warp looks at all of them: none waits for another
    b, before, size, all_tiles, extra = runs.find(
        run, num_runs, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
        capacity, window_left, window_right, lanes, True, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    at = run * size
    stop = gl.minimum(at + size, all_tiles)
    k_base = k_ptr + head_kv.to(gl.int64) * k_strides[2]
    v_base = v_ptr + head_kv.to(gl.int64) * v_strides[2]
    gl.warp_specialize(
        [
            (
                multiply_run,
                (
                    q_ptr, q_strides, out_ptr, lse_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
                    k_ring, v_ring, k_barriers, v_barriers, run, head_kv, at, b, before, extra, stop, row,
                    batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                    capacity, window_left, window_right, HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
                    BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES,
                ),
            ),
            (
                load_run,
                (
                    k_base, v_base, k_strides, v_strides, k_ring, v_ring, k_barriers, v_barriers,
                    block_table_ptr, table_stride, pool_pages, cache_batch_idx_ptr, cache_rows, at, b, before,
                    extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
                    max_q_len, new_tokens, capacity, window_left, window_right, GROUP, HEAD_DIM, HEAD_DIM_V,
                    BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, STAGES, LOADERS,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip


def launch(
    queries: Queries, cache: KVCache, options: Options, plan: Plan, *, parts: Tensor, part_lse: Tensor
) -> repeat.Repeat | None:
    """Launch as :func:`flash_decoding.kernels.balanced.launch` does, with the same arguments."""
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.num_splits
    args = (*attend.inputs(queries, cache, options, parts, part_lse), queries.batch, plan.num_splits)
    return repeat.launch(balanced_kernel, programs, args, constants(queries, cache, options, plan))
