"""Equal runs by warps with roles: grid and arguments of :mod:`flash_decoding.kernels.balanced`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import ahead, attend, balanced, overlap, repeat, runs
from flash_decoding.kernels.roles import ring, states
from flash_decoding.kernels.roles.attend import constants, lines_of
from flash_decoding.kernels.roles.multiplying import FEW_ROWS, MULTIPLIERS
from flash_decoding.kernels.roles.runs import load_run, multiply_run

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


@gluon.jit(do_not_specialize=balanced.UNSPECIALISED)
def balanced_roles_kernel(
    q_ptr: gl.tensor,
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q_strides: gl.tuple,  # token of the batch, token, head
    k_strides: gl.tuple,  # page, slot, head
    v_strides: gl.tuple,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    key_mask_ptr: gl.tensor,  # None, as the next two: the planner leaves masks to the portable kernel
    key_mask_stride: gl.tensor,
    key_mask_columns: gl.tensor,
    cache_batch_idx_ptr: gl.tensor,
    block_table_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    alibi_ptr: gl.tensor,
    alibi_strides: gl.tuple,
    sinks_ptr: gl.tensor,
    scale: gl.tensor,
    softcap: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    pool_pages: gl.tensor,
    cache_rows: gl.tensor,
    table_stride: gl.tensor,
    batch: gl.tensor,
    num_runs: gl.tensor,
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
    MULTIPLIER_REGISTERS: gl.constexpr,
) -> None:
    k_ring = ring.make(k_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, LOADERS)
    v_ring = ring.make(v_ptr.dtype.element_ty, BLOCK_M, BLOCK_N, BLOCK_DV, STAGES, LOADERS)
    TURNS: gl.constexpr = 1 if BLOCK_M == FEW_ROWS else 2
    if TURNS > 1:
        room = states.make(BLOCK_M, BLOCK_DV)
    else:
        room = k_ring  # of no use
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = gl.program_id(0)
    row, head_kv = pid % row_tiles * BLOCK_M, pid // row_tiles % HEADS_KV
    run = pid // (row_tiles * HEADS_KV)
    # Every warp looks at all sequences: none waits for another.
    lanes = gl.arange(
        0, runs.BATCH, gl.BlockedLayout([runs.BATCH // ring.WARP], [ring.WARP], [MULTIPLIERS], [0])
    )
    threads: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [MULTIPLIERS, 1], [1, 0])
    b, before, size, all_tiles, extra, early = ahead.find_run(
        k_ptr, v_ptr, k_strides, v_strides, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
        cache_batch_idx_ptr, window_left, window_right, max_q_len, new_tokens, capacity, cache_rows, batch,
        run, num_runs, head_kv, lanes, gl.arange(0, ahead.SLOTS_OF_A_RUN, gl.SliceLayout(1, threads)),
        lines_of(k_ptr, BLOCK_D, threads), lines_of(v_ptr, BLOCK_DV, threads), GROUP, HEAD_DIM, HEAD_DIM_V,
        BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    _, now = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if (batch > runs.BATCH) | (gl.max((now != early).to(gl.int32), 0) > 0):
        b, before, size, all_tiles, extra = runs.find(
            run, num_runs, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, lanes, now, True, GROUP, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
    at = run * size
    stop = gl.minimum(at + size, all_tiles)
    if TURNS == 1:
        gl.warp_specialize(
            [
                (
                    multiply_run,
                    (
                        q_ptr, out_ptr, lse_ptr, q_strides, k_ring, v_ring, room, alibi_ptr, alibi_strides, sinks_ptr,
                        scale, softcap, run, head_kv, at, b, before, extra, stop, row, batch, cache_seqlens_ptr,
                        cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left,
                        window_right, HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                        BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES, TURNS, 0,
                    ),
                ),
                (
                    load_run,
                    (
                        k_ptr, v_ptr, k_strides, v_strides, k_ring, v_ring, cache_batch_idx_ptr, cache_rows,
                        block_table_ptr, table_stride, pool_pages, head_kv, at, b, before, extra, stop, row,
                        batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                        capacity, window_left, window_right, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                        BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, STAGES, LOADERS,
                    ),
                ),
            ],
            [LOADERS],
            [LOADER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    multiply_run,
                    (
                        q_ptr, out_ptr, lse_ptr, q_strides, k_ring, v_ring, room, alibi_ptr, alibi_strides, sinks_ptr,
                        scale, softcap, run, head_kv, at, b, before, extra, stop, row, batch, cache_seqlens_ptr,
                        cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left,
                        window_right, HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                        BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES, TURNS, 0,
                    ),
                ),
                (
                    multiply_run,
                    (
                        q_ptr, out_ptr, lse_ptr, q_strides, k_ring, v_ring, room, alibi_ptr, alibi_strides, sinks_ptr,
                        scale, softcap, run, head_kv, at, b, before, extra, stop, row, batch, cache_seqlens_ptr,
                        cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left,
                        window_right, HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                        BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES, TURNS, 1,
                    ),
                ),
                (
                    load_run,
                    (
                        k_ptr, v_ptr, k_strides, v_strides, k_ring, v_ring, cache_batch_idx_ptr, cache_rows,
                        block_table_ptr, table_stride, pool_pages, head_kv, at, b, before, extra, stop, row,
                        batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                        capacity, window_left, window_right, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                        BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, STAGES, LOADERS,
                    ),
                ),
            ],
            [MULTIPLIERS, LOADERS],
            [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
        )  # fmt: skip


def launch(
    queries: Queries, cache: KVCache, options: Options, plan: Plan, *, parts: Tensor, part_lse: Tensor
) -> repeat.Repeat | None:
    """Launch as :func:`flash_decoding.kernels.balanced.launch` does, with the same arguments."""
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.num_splits
    args = (*attend.inputs(queries, cache, options, parts, part_lse), queries.batch, plan.num_splits)
    return repeat.launch(balanced_roles_kernel, programs, args, constants(queries, cache, options, plan))
