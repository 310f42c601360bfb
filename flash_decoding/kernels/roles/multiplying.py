"""The multipliers: one warpgroup that takes tiles out of the ring into the online softmax.

Up to 16 rows, each warp takes a share of the keys of a tile (and then of the columns of the values) by the
instructions that every GPU since Ampere has. With more, each warp has 16 of 64 rows, and the products are
Hopper's, which read the ring themselves.
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

FEW_ROWS = gl.constexpr(16)
MULTIPLIERS = gl.constexpr(4)
"""Warps: a warpgroup."""


@gluon.constexpr_function
def product_layout(rows, columns):  # noqa: ANN001, ANN201
    """Layout of a product (rows, columns)."""
    if rows <= 16:
        return gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def query_layout(columns, element_bytes):  # noqa: ANN001, ANN201
    """Threads of the queries (rows, columns) as they are read."""
    wide = 16 // element_bytes
    along = min(32, columns // wide)
    return gl.BlockedLayout([1, wide], [32 // along, along], [4, 1], [1, 0])


@gluon.jit
def multiply(a, buffer, acc, full, free, parity):
    """acc + a @ (what a buffer holds, when it is full); the buffer is free afterwards."""
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
    q_ptr,
    q_strides,
    cu_seqlens_q_ptr,
    alibi_ptr,
    alibi_strides,
    sinks_ptr,
    scale,
    softcap,
    window_left,
    window_right,
    k_ring,
    v_ring,
    k_barriers,
    v_barriers,
    b,
    head_kv,
    row,
    q_start,
    q_len,
    end,
    lo,
    hi,
    first_tile,
    step,
    count,
    is_first,
    turn,
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
):
    """State (peak, total, acc) of a row tile that has seen ``count`` tiles of sequence b out of the ring."""
    scores_in: gl.constexpr = product_layout(BLOCK_M, BLOCK_N)
    acc_in: gl.constexpr = product_layout(BLOCK_M, BLOCK_DV)
    q_in: gl.constexpr = query_layout(BLOCK_D, q_ptr.dtype.element_ty.primitive_bitwidth // 8)
    q_token, q_head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, q_in))
    q_cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, q_in))
    q = load_queries(q_ptr, q_strides, b, q_start, q_token, q_head, in_q, cu_seqlens_q_ptr, q_cols, HEAD_DIM)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, scores_in, 2))

    token, head, lives = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, scores_in))
    totals: gl.constexpr = BLOCK_N if BLOCK_M == FEW_ROWS else 1
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, scores_in))
    total = gl.zeros([BLOCK_M, totals], gl.float32, scores_in)
    acc = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, acc_in)
    lanes = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_in))
    if sinks_ptr is not None:
        if is_first:  # the sink belongs to one part, so that the merge counts it once
            peak = gl.load(sinks_ptr + head, mask=lives, other=0.0).to(gl.float32) * softmax.LOG2E
            places = gl.arange(0, totals, gl.SliceLayout(0, scores_in))
            total += (places == 0).to(gl.float32)[None, :]
    position = end - q_len + token
    slopes = score.slopes(alibi_ptr, alibi_strides, b, head, lives)
    for i in range(count):
        stage, parity = ring.place(turn + i, STAGES)
        slots = (first_tile + i * step) * BLOCK_N + lanes
        live = (slots >= lo) & (slots < hi)
        none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, scores_in)
        scores = multiply(
            q, k_ring.index(stage).permute((1, 0)), none, k_barriers[0].index(stage),
            k_barriers[1].index(stage), parity,
        )  # fmt: skip
        scores = score.transform(scores, slots, position, scale, softcap, slopes, alibi_ptr, SOFTCAP)
        sees = keys.row_sees(slots, live, position, window_left, window_right, BOUND_LEFT, BOUND_RIGHT)
        scores = gl.where(sees, scores, float("-inf"))
        peak, total, alpha, p = softmax.weigh(peak, total, scores)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc_in))
        p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, acc_in, 2))
        acc = multiply(
            p, v_ring.index(stage), acc * alpha[:, None], v_barriers[0].index(stage),
            v_barriers[1].index(stage), parity,
        )  # fmt: skip
    peak, total, acc = softmax.gather(peak, total, acc)
    in_acc: gl.constexpr = gl.SliceLayout(1, acc_in)
    return gl.convert_layout(peak, in_acc), gl.convert_layout(total, in_acc), acc


@gluon.jit
def rows_of(row, head_kv, q_len, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, layout: gl.constexpr):
    """Query token and head of each row of a tile, and whether there is such a row."""
    rows = row + gl.arange(0, BLOCK_M, layout)
    return rows // GROUP, head_kv * GROUP + rows % GROUP, rows < q_len * GROUP
