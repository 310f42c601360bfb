"""Even splits by warps with roles; grid, arguments and results as in :mod:`flash_decoding.kernels.attend`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import arguments, attend, repeat
from flash_decoding.kernels.load import VIA_L2
from flash_decoding.kernels.roles import build, early, ring
from flash_decoding.kernels.roles.units import load_units, multiply_units, part_of, place_of, slots_of

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


@gluon.jit(do_not_specialize=[*attend.SIZES, *attend.STRIDES, *attend.TABLES, "batch"])
def attend_roles_kernel(
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
    lse_sequence: gl.tensor,
    lse_head: gl.tensor,
    lse_token: gl.tensor,
    lse_split: gl.tensor,
    num_splits: gl.tensor,
    batch: gl.tensor,
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
    IS_SPLIT: gl.constexpr,
    SPLIT_TILES: gl.constexpr,
    LEAF_TILES: gl.constexpr,
    SHORT_TILES: gl.constexpr,
    BY_LEAF: gl.constexpr,
    SMALL_SPLIT_TILES: gl.constexpr,
    SMALL_SPLITS: gl.constexpr,
    STATES: gl.constexpr,
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
    FIXED: gl.constexpr = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    k_ring = ring.make(k_ptr.dtype.element_ty, BLOCK_N, BLOCK_D, STAGES, LOADERS)
    v_ring = ring.make(v_ptr.dtype.element_ty, BLOCK_N, BLOCK_DV, STAGES, LOADERS)
    EXPECTS: gl.constexpr = OVERLAP and PAGE_SIZE == 0 and cu_seqlens_q_ptr is None
    foreseen = (0, (0, (0, 0, 0, 0, 0, 0), 0))
    if OVERLAP and cu_seqlens_q_ptr is None:
        row, head_kv, split, b = place_of(
            gl.program_id(0), max_q_len, num_splits, HEADS_KV, GROUP, BLOCK_M, IS_SPLIT
        )
        early.ask_for_queries(queries, b, row, head_kv, 0, max_q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        slots = slots_of(b, cache, lengths, VIA_L2)
        part = part_of(
            row, split, max_q_len, slots, lengths, num_splits, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT,
            BOUND_RIGHT, IS_SPLIT, FIXED,
        )  # fmt: skip
        foreseen = (slots, part)
        early.ask(cache, head_kv, part[1], HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE)
    units = gl.cdiv(max_q_len * GROUP, BLOCK_M) * HEADS_KV * num_splits * batch
    results = (out_ptr, lse_ptr, (lse_sequence, lse_head, lse_token, lse_split))
    gl.warp_specialize(
        [
            (
                multiply_units,
                (
                    cache, lengths, queries, scoring, results, k_ring, v_ring, units, num_splits, foreseen,
                    HEADS_KV, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE,
                    BOUND_LEFT, BOUND_RIGHT, SCORES, OVERLAP, IS_SPLIT, FIXED, STATES, LEAVES, EXPECTS,
                    STAGES, IN_FLIGHT,
                ),
            ),
            (
                load_units,
                (
                    cache, lengths, queries, k_ring, v_ring, units, num_splits, foreseen, HEADS_KV, GROUP,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT,
                    BOUND_RIGHT, OVERLAP, IS_SPLIT, FIXED, EXPECTS, STAGES, IN_FLIGHT, LOADERS,
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
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int, int],
) -> repeat.Repeat | None:
    """Launch as :func:`flash_decoding.kernels.attend.launch` does, with the same arguments."""
    units, args = attend.grid_and_arguments(
        queries, cache, options, plan, out=out, lse=lse, lse_strides=lse_strides
    )
    programs = min(units, plan.programs) if plan.programs else units
    args = (*args, queries.batch)
    constants = build.constants(queries, cache, options, plan) | arguments.of_parts(plan)
    return repeat.launch(attend_roles_kernel, programs, args, constants)
