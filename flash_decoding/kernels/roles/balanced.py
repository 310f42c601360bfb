"""Runs by warps with roles, of equal shares (:mod:`flash_decoding.kernels.balanced`) or of whole splits of a
fixed size (:mod:`flash_decoding.kernels.fixed`): grid and results as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import arguments, balanced, fixed_sizes, repeat, runs
from flash_decoding.kernels.load import VIA_L2
from flash_decoding.kernels.roles import build, early, ring, walk
from flash_decoding.kernels.roles.runs import load_run, multiply_run

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


@gluon.jit(do_not_specialize=[*balanced.UNSPECIALISED, "num_parts"])
def balanced_roles_kernel(
    q_ptr: gl.tensor,
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q_strides: gl.tuple,  # token of the batch, token, head
    k_strides: gl.tuple,  # page, slot, head
    v_strides: gl.tuple,  # None: as those of keys
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
    num_parts: gl.tensor,  # of a sequence at most; None where shares are equal
    final_ptr: gl.tensor,  # the results of whole sequences, and their LSEs
    final_lse_ptr: gl.tensor,
    lse_sequence: gl.tensor,
    lse_head: gl.tensor,
    lse_token: gl.tensor,
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
    SCORES: gl.constexpr,
    OVERLAP: gl.constexpr,
    SPLIT_TILES: gl.constexpr,  # 0 where shares are equal
    LEAF_TILES: gl.constexpr,
    SHORT_TILES: gl.constexpr,
    BY_LEAF: gl.constexpr,
    SMALL_SPLIT_TILES: gl.constexpr,
    SMALL_SPLITS: gl.constexpr,
    LEAVES: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
) -> None:
    if v_strides is None:
        v_strides = k_strides
    cache = (
        k_ptr, v_ptr, k_strides, v_strides, cache_batch_idx_ptr, cache_rows, block_table_ptr, table_stride,
        pool_pages,
    )  # fmt: skip
    lengths = (
        cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, window_left,
        window_right,
    )  # fmt: skip
    queries = (q_ptr, q_strides, cu_seqlens_q_ptr)
    scoring = (alibi_ptr, alibi_strides, sinks_ptr, scale, softcap, window_left, window_right)
    k_ring = ring.make(k_ptr.dtype.element_ty, BLOCK_N, BLOCK_D, STAGES, LOADERS)
    v_ring = ring.make(v_ptr.dtype.element_ty, BLOCK_N, BLOCK_DV, STAGES, LOADERS)
    pid, row_tiles = gl.program_id(0), gl.cdiv(max_q_len * GROUP, BLOCK_M)
    row, head_kv = pid % row_tiles * BLOCK_M, pid // row_tiles % HEADS_KV
    EXPECTS: gl.constexpr = OVERLAP and PAGE_SIZE == 0 and cu_seqlens_q_ptr is None
    where = (row, head_kv, pid // (row_tiles * HEADS_KV), num_runs, batch, num_parts)
    FIXED: gl.constexpr = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    tiles = walk.tiles_of(batch, lengths, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA_L2)
    found = walk.begin(where, tiles, lengths, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED, VIA_L2)
    early_tiles = gl.allocate_shared_memory(gl.int32, [runs.BATCH], walk.IN_A_ROW, tiles)
    expected = (0, 0, 0, 0, 0, 0)
    if OVERLAP and cu_seqlens_q_ptr is None:
        at, b, before, size, extra, stop = found
        _, _, _, seen, hands, _, _, _, _ = walk.visit(
            at, gl.minimum(b, batch - 1), before, size, extra, stop, where, cache, lengths, GROUP,
            BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, FIXED, VIA_L2,
        )  # fmt: skip
        expected, _, _ = walk.part_at(at, before, seen, hands, PAGE_SIZE, FIXED)
        b = gl.minimum(b, batch - 1)
        early.ask_for_queries(queries, b, row, head_kv, 0, max_q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        early.ask(cache, head_kv, expected, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE)
    results = (out_ptr, lse_ptr, (final_ptr, final_lse_ptr, (lse_sequence, lse_head, lse_token)))
    gl.warp_specialize(
        [
            (
                multiply_run,
                (
                    cache, lengths, queries, scoring, results, k_ring, v_ring, where,
                    early_tiles, found, expected, HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, SCORES, OVERLAP, FIXED, LEAVES,
                    EXPECTS, STAGES, IN_FLIGHT,
                ),
            ),
            (
                load_run,
                (
                    cache, lengths, queries, k_ring, v_ring, where, early_tiles, found, expected,
                    GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT,
                    BOUND_RIGHT, OVERLAP, FIXED, EXPECTS, STAGES, IN_FLIGHT, LOADERS,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip


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
    """Launch as the portable kernels' ``launch`` does, with the same arguments; the plan says which."""
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    num_runs = plan.runs or plan.num_splits
    num_parts = plan.num_splits if plan.runs else None
    first = arguments.inputs(queries, cache, options, parts, part_lse)
    args = (*first, queries.batch, num_runs, num_parts, out, lse, *lse_strides)
    constants = build.constants(queries, cache, options, plan) | fixed_sizes.constants(plan)
    return repeat.launch(balanced_roles_kernel, row_tiles * cache.heads * num_runs, args, constants)
