"""The multipliers: four warps that take tiles out of the rings into the online softmax, or twice four.

Up to 16 rows go through the products of every GPU since Ampere: each warp takes a share of a tile's keys,
and then of the values' columns. (A state for each warp, with its own
keys and all columns, never has to meet the others, and was slower: it costs registers.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_decoding.kernels import keys, score, softmax
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.rows import load_queries

MULTIPLIERS = gl.constexpr(4)
"""Warps."""

FEW_ROWS = gl.constexpr(16)


@gluon.constexpr_function
def product_of(rows: int, columns: int) -> gl.NVMMADistributedLayout:
    """Which thread has what of a product (rows, columns): warps side by side, or one below the other."""
    if rows <= FEW_ROWS.value:
        return gl.NVMMADistributedLayout([2, 0], [1, MULTIPLIERS.value], [16, 8])
    return gl.NVMMADistributedLayout([3, 0], [MULTIPLIERS.value, 1], [16, columns, 16])


@gluon.constexpr_function
def threads_of(columns: int, bits: int) -> gl.BlockedLayout:
    """Which thread reads what of the queries (rows, columns)."""
    wide = 128 // bits
    along = min(ring.WARP.value, columns // wide)
    return gl.BlockedLayout([1, wide], [ring.WARP.value // along, along], [MULTIPLIERS.value, 1], [1, 0])


@gluon.jit
def rows_of(
    row: gl.tensor,
    head_kv: gl.tensor,
    q_len: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tuple:
    """Query token and head of each row of a tile, and whether there is such a row."""
    rows = row + gl.arange(0, BLOCK_M, layout)
    return rows // GROUP, head_kv * GROUP + rows % GROUP, rows < q_len * GROUP


@gluon.jit
def multiply(a: gl.tensor, tile: gl.tuple, acc: gl.tensor, TRANSPOSED: gl.constexpr) -> gl.tensor:
    """acc + a @ tile as soon as it is there; its buffer is free as soon as nobody reads it any more."""
    buffer, full, free, parity = tile
    if TRANSPOSED:
        buffer = buffer.permute((1, 0))
    mbarrier.wait(full, parity)
    if a.shape[0] == FEW_ROWS:
        b = buffer.load(gl.DotOperandLayout(1, acc.type.layout, 2))
        mbarrier.arrive(free)
        product = mma_v2(a, b, acc)
    else:
        fence_async_shared()  # the copies are not the matrix unit's own
        product = warpgroup_mma_wait(0, deps=[warpgroup_mma(a, buffer, acc, is_async=True)])
        mbarrier.arrive(free)
    return product


@gluon.jit
def multiply_part(
    q_ptr: gl.tensor,
    q_strides: gl.tuple,
    cu_seqlens_q_ptr: gl.tensor,
    alibi_ptr: gl.tensor,
    alibi_strides: gl.tuple,
    sinks_ptr: gl.tensor,
    scale: gl.tensor,
    softcap: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    b: gl.tensor,
    head_kv: gl.tensor,
    row: gl.tensor,
    q_start: gl.tensor,
    q_len: gl.tensor,
    end: gl.tensor,
    lo: gl.tensor,
    hi: gl.tensor,
    first_tile: gl.tensor,
    step: gl.tensor,
    count: gl.tensor,
    is_first: gl.tensor,
    turn: gl.tensor,
    TURNS: gl.constexpr,
    WHO: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tuple:
    """State (peak, total, acc) of a row tile that has seen tiles of the rings, from ``turn`` to ``turn + count``.

    Of TURNS multipliers each takes every TURNS-th of them, WHO the first that it is the turn of.
    """
    threads: gl.constexpr = threads_of(BLOCK_D, q_ptr.dtype.element_ty.primitive_bitwidth)
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, threads))
    q_cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, threads))
    q = load_queries(q_ptr, q_strides, b, q_start, token, head, in_q, cu_seqlens_q_ptr, q_cols, HEAD_DIM)
    scores_in: gl.constexpr = product_of(BLOCK_M, BLOCK_N)
    acc_in: gl.constexpr = product_of(BLOCK_M, BLOCK_DV)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, scores_in, 2))

    of_row: gl.constexpr = gl.SliceLayout(1, scores_in)
    totals: gl.constexpr = BLOCK_N if BLOCK_M == FEW_ROWS else 1
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, of_row)
    lanes = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_in))
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, of_row)
    total = gl.zeros([BLOCK_M, totals], gl.float32, scores_in)
    acc = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, acc_in)
    if sinks_ptr is not None:
        if is_first & (WHO == 0):  # the sink belongs to one state, so that the merge counts it once
            peak = gl.load(sinks_ptr + head, mask=in_q, other=0.0).to(gl.float32) * softmax.LOG2E
            places = gl.arange(0, totals, gl.SliceLayout(0, scores_in))
            total += (places == 0).to(gl.float32)[None, :]
    position = end - q_len + token
    slopes = score.slopes(alibi_ptr, alibi_strides, b, head, in_q)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_in)
    for i in range((turn + WHO) % TURNS, count, TURNS):
        slots = (first_tile + i * step) * BLOCK_N + lanes
        live = (slots >= lo) & (slots < hi)
        scores = multiply(q, ring.at(k_ring, turn + i, STAGES), nothing, True)
        scores = score.transform(scores, slots, position, scale, softcap, slopes, alibi_ptr, SOFTCAP)
        sees = keys.row_sees(slots, live, position, window_left, window_right, BOUND_LEFT, BOUND_RIGHT)
        scores = gl.where(sees, scores, float("-inf"))
        peak, total, alpha, p = softmax.weigh(peak, total, scores)
        p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, acc_in, 2))
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc_in))
        acc = multiply(p, ring.at(v_ring, turn + i, STAGES), acc * alpha[:, None], False)
    peak, total, acc = softmax.gather(peak, total, acc)
    in_acc: gl.constexpr = gl.SliceLayout(1, acc_in)
    return gl.convert_layout(peak, in_acc), gl.convert_layout(total, in_acc), acc
