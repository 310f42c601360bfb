"""Warps with roles, one part for each program: even splits, as in :mod:`flash_decoding.kernels.attend`.

Grid (one dimension): row tiles, key/value heads, splits, sequences, fastest first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import ahead, attend, keys, load, overlap, repeat, softmax
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.loading import load_part
from flash_decoding.kernels.roles.multiplying import MULTIPLIERS, multiply_part, product_layout, rows_of
from flash_decoding.kernels.rows import lse_offset, store_out

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

LOADERS = 4
"""Warps that load."""

GUESS = int(__import__("os").environ.get("GUESS", "32"))
LOADER_REGISTERS = 152
"""Registers of a loader's thread; what is left is the multipliers'."""


@gluon.jit(do_not_specialize=[*attend.SIZES, *attend.STRIDES, *attend.TABLES])
def attend_kernel(
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
    lse_sequence,
    lse_head,
    lse_token,
    lse_split,
    num_splits,
    split_tiles,
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
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = gl.program_id(0)
    row = pid % row_tiles * BLOCK_M
    head_kv = pid // row_tiles % HEADS_KV
    split = pid // (row_tiles * HEADS_KV) % num_splits
    b = pid // (row_tiles * HEADS_KV * num_splits)
    if OVERLAP:
        bits: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth
        asking: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [MULTIPLIERS, 1], [1, 0])
        k_lines = gl.arange(0, load.lines_of(BLOCK_D, bits), gl.SliceLayout(0, asking))
        v_lines = gl.arange(0, load.lines_of(BLOCK_DV, bits), gl.SliceLayout(0, asking))
        if num_splits > 1:
            if PAGE_SIZE % BLOCK_N == 0:
                tile = gl.arange(0, BLOCK_N, gl.SliceLayout(1, asking))
                ahead.ask(
                    k_ptr, v_ptr, k_strides, v_strides, cache_seqlens_ptr, cache_leftpad_ptr,
                    cache_batch_idx_ptr, block_table_ptr, window_left, window_right, max_q_len, new_tokens,
                    capacity, pool_pages, cache_rows, table_stride, num_splits, split_tiles, b, row, head_kv,
                    split, tile, k_lines, v_lines, GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, PAGE_SIZE,
                    BOUND_LEFT, BOUND_RIGHT,
                )  # fmt: skip
        elif GUESS > 0:
            some = gl.arange(0, GUESS, gl.SliceLayout(1, asking))
            ahead.guess(
                k_ptr, v_ptr, k_strides, v_strides, b.to(gl.int64), head_kv, capacity, some, k_lines,
                v_lines, HEAD_DIM, HEAD_DIM_V,
            )  # fmt: skip
        overlap.wait_for_the_kernel_before()
        if num_splits > 1:
            overlap.let_the_next_kernel_start()
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    if row >= q_len * GROUP:
        return
    origin, tiles, live_splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK_N)
    if split >= live_splits:
        return
    first_tile, step, count = keys.hand_of(split, origin, tiles, live_splits, split_tiles, PAGE_SIZE > 0)
    k_base = k_ptr + head_kv.to(gl.int64) * k_strides[2]
    v_base = v_ptr + head_kv.to(gl.int64) * v_strides[2]
    cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
    turn = 0
    peak, total, acc = gl.warp_specialize(
        [
            (
                multiply_part,
                (
                    q_ptr, q_strides, cu_seqlens_q_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
                    window_left, window_right, k_ring, v_ring, k_barriers, v_barriers, b, head_kv, row,
                    q_start, q_len, end, lo, hi, first_tile, step, count, split == 0, turn, GROUP, HEAD_DIM,
                    BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES,
                ),
            ),
            (
                load_part,
                (
                    k_base, v_base, k_strides, v_strides, k_ring, v_ring, k_barriers, v_barriers,
                    block_table_ptr, table_stride, pool_pages, cache_row, lo, hi, first_tile, step, count,
                    turn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PAGE_SIZE, STAGES, LOADERS,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip
    acc_in: gl.constexpr = product_layout(BLOCK_M, BLOCK_DV)
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, acc_in))
    cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, acc_in))
    flat_row = ((q_start + token) * (HEADS_KV * GROUP) + head) * num_splits + split
    store_out(out_ptr, acc / softmax.denominator(total)[:, None], flat_row, in_q, cols, HEAD_DIM_V)
    if lse_ptr is not None:
        strides = (lse_sequence, lse_head, lse_token)
        offset = lse_offset(strides, b, q_start, token, head, cu_seqlens_q_ptr) + split * lse_split
        gl.store(lse_ptr + offset, softmax.log_sum_exp(peak, total), mask=in_q)


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
    row_tiles = triton.cdiv(queries.q_len * (queries.heads // cache.heads), plan.tile.block_m)
    programs = row_tiles * cache.heads * plan.num_splits * queries.batch
    split_tiles = plan.split_tokens // plan.tile.block_n
    args = (*attend.inputs(queries, cache, options, out, lse), *lse_strides, plan.num_splits, split_tiles)
    return repeat.launch(attend_kernel, programs, args, constants(queries, cache, options, plan))


def guessable(cache: KVCache, options: Options) -> bool:
    """Whether the first key of a sequence is known before its length is."""
    placed = (cache.block_table, cache.cache_batch_idx, cache.cache_leftpad)
    return options.window_left < 0 and all(x is None for x in placed)


def constants(queries: Queries, cache: KVCache, options: Options, plan: Plan) -> dict[str, object]:
    """What the kernel is compiled for, as for the portable one; and the ring."""
    return {
        **attend.constants(queries, cache, options, plan),
        "num_stages": 1,
        "STAGES": plan.tile.num_stages,
        "LOADERS": LOADERS,
        "LOADER_REGISTERS": LOADER_REGISTERS,
        "GUESS": GUESS if guessable(cache, options) else 0,
    }
