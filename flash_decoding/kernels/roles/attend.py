"""The kernel of warps with roles; grid, arguments and results as in :mod:`flash_decoding.kernels.attend`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import ahead, attend, keys, load, overlap, repeat
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.loading import load_part
from flash_decoding.kernels.roles.multiplying import MULTIPLIERS, PRODUCT, multiply_part, rows_of
from flash_decoding.kernels.rows import store_split

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries

LOADERS = 4
"""Warps that load."""

REGISTERS, REGISTERS_OF_LOADERS = 128, 96
"""Of a thread, and of one that loads: what those leave, the multipliers have. With so few there is room on a
multiprocessor for the combine, and for the next call's programs, before this one's have ended."""

MORE_REGISTERS, MORE_REGISTERS_OF_LOADERS = 168, 104
"""The same for wide heads and for options on scores, which would spill."""


@gluon.jit
def lines_of(base_ptr: gl.tensor, BLOCK_COLS: gl.constexpr, threads: gl.constexpr) -> gl.tensor:
    """As :func:`load.lines_of`, laid out for some threads."""
    bits: gl.constexpr = BLOCK_COLS * base_ptr.dtype.element_ty.primitive_bitwidth
    count: gl.constexpr = (bits + load.LINE_BITS - 1) // load.LINE_BITS
    return gl.arange(0, count, gl.SliceLayout(0, threads))


@gluon.jit(do_not_specialize=[*attend.SIZES, *attend.STRIDES, *attend.TABLES])
def attend_roles_kernel(
    q_ptr: gl.tensor,
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q_strides: gl.tuple,  # token of the batch, token, head
    k_strides: gl.tuple,  # row of the cache, slot, head
    v_strides: gl.tuple,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    key_mask_ptr: gl.tensor,  # None, as the next two: the planner leaves masks to the portable kernel
    key_mask_stride: gl.tensor,
    key_mask_columns: gl.tensor,
    cache_batch_idx_ptr: gl.tensor,
    block_table_ptr: gl.tensor,  # None: it leaves pages to it, too
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
    split_tiles: gl.tensor,
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
) -> None:
    k_ring = ring.make(k_ptr.dtype.element_ty, BLOCK_N, BLOCK_D, STAGES, LOADERS)
    v_ring = ring.make(v_ptr.dtype.element_ty, BLOCK_N, BLOCK_DV, STAGES, LOADERS)
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    pid = gl.program_id(0)
    row = pid % row_tiles * BLOCK_M
    head_kv = pid // row_tiles % HEADS_KV
    split = pid // (row_tiles * HEADS_KV) % num_splits
    b = pid // (row_tiles * HEADS_KV * num_splits)
    if OVERLAP:
        if num_splits > 1:  # as in the portable kernel, and for its reasons
            threads: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [MULTIPLIERS, 1], [1, 0])
            ahead.ask(
                k_ptr, v_ptr, k_strides, v_strides, cache_seqlens_ptr, cache_leftpad_ptr, cache_batch_idx_ptr,
                block_table_ptr, window_left, window_right, max_q_len, new_tokens, capacity, pool_pages,
                cache_rows, table_stride, num_splits, split_tiles, b, row, head_kv, split,
                gl.arange(0, BLOCK_N, gl.SliceLayout(1, threads)), lines_of(k_ptr, BLOCK_D, threads),
                lines_of(v_ptr, BLOCK_DV, threads), GROUP, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, PAGE_SIZE,
                BOUND_LEFT, BOUND_RIGHT,
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
    cache_row, head = load.cache_row(b, cache_batch_idx_ptr, cache_rows), head_kv.to(gl.int64)
    k_row_ptr = k_ptr + (cache_row * k_strides[0] + head * k_strides[2])
    v_row_ptr = v_ptr + (cache_row * v_strides[0] + head * v_strides[2])
    peak, total, acc = gl.warp_specialize(
        [
            (
                multiply_part,
                (
                    q_ptr, q_strides, cu_seqlens_q_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
                    window_left, window_right, k_ring, v_ring, b, head_kv, row, q_start, q_len, end, lo, hi,
                    first_tile, step, count, split == 0, GROUP, HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N,
                    BOUND_LEFT, BOUND_RIGHT, SOFTCAP, STAGES,
                ),
            ),
            (
                load_part,
                (
                    k_row_ptr, v_row_ptr, k_strides[1], v_strides[1], k_ring, v_ring, lo, hi, first_tile,
                    step, count, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, STAGES, LOADERS,
                ),
            ),
        ],
        [LOADERS],
        [LOADER_REGISTERS],
    )  # fmt: skip
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, PRODUCT))
    store_split(
        out_ptr, lse_ptr, (lse_sequence, lse_head, lse_token, lse_split), peak, total, acc, b, q_start, token,
        head, in_q, gl.arange(0, BLOCK_DV, gl.SliceLayout(0, PRODUCT)), cu_seqlens_q_ptr, split, num_splits,
        HEADS_KV * GROUP, HEAD_DIM_V,
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
    programs, args = attend.grid_and_arguments(
        queries, cache, options, plan, out=out, lse=lse, lse_strides=lse_strides
    )
    return repeat.launch(attend_roles_kernel, programs, args, constants(queries, cache, options, plan))


def constants(queries: Queries, cache: KVCache, options: Options, plan: Plan) -> dict[str, Any]:
    """What the kernel is compiled for: as the portable one, and rings and registers."""
    same = attend.constants(queries, cache, options, plan)
    roomy = options.is_plain and max(same["BLOCK_D"], same["BLOCK_DV"]) <= 128
    return {
        **same,
        "num_stages": 1,
        "maxnreg": REGISTERS if roomy else MORE_REGISTERS,
        "STAGES": plan.tile.num_stages,
        "LOADERS": LOADERS,
        "LOADER_REGISTERS": REGISTERS_OF_LOADERS if roomy else MORE_REGISTERS_OF_LOADERS,
    }
