"""The multipliers: four warps that take tiles out of the rings into the online softmax.

Each takes a share of a tile's keys, and then of the values' columns. (A state for each warp, with its own
keys and all columns, never has to meet the others, and was slower: it costs registers.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels import keys, score, softmax
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.rows import load_queries

MULTIPLIERS = gl.constexpr(4)
"""Warps."""

NARROW = gl.constexpr(128)
"""Columns of a head up to which a warp's keys are enough for sums of products to go on side by side."""

PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8]))
"""Which thread has what of a product (rows, columns): warps side by side."""


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
def multiply_keys(q: gl.tuple, tile: gl.tuple, acc: gl.tensor) -> gl.tensor:
    """acc + q @ keys as soon as these are there; their buffer is free as soon as they are in registers.

    There is a sum for each piece of the columns.
    """
    buffer, full, free, parity = tile
    mbarrier.wait(full, parity)
    if len(q) == 1:
        k = buffer.permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2))
        mbarrier.arrive(free)
        scores = mma_v2(q[0], k, acc)
    else:
        half: gl.constexpr = buffer.shape[1] // 2
        k = buffer.slice(0, half, 1).permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2))
        k_other = buffer.slice(half, half, 1).permute((1, 0)).load(gl.DotOperandLayout(1, PRODUCT, 2))
        mbarrier.arrive(free)
        scores = mma_v2(q[0], k, acc)
        scores += mma_v2(q[1], k_other, gl.zeros(acc.shape, gl.float32, PRODUCT))
    return scores


@gluon.jit
def multiply_values(p: gl.tensor, tile: gl.tuple, acc: gl.tensor) -> gl.tensor:
    """acc + p @ values, likewise."""
    buffer, full, free, parity = tile
    mbarrier.wait(full, parity)
    v = buffer.load(gl.DotOperandLayout(1, PRODUCT, 2))
    mbarrier.arrive(free)
    return mma_v2(p, v, acc)


@gluon.jit
def load_piece(
    queries: gl.tuple,
    b: gl.tensor,
    row: gl.tensor,
    head_kv: gl.tensor,
    q_start: gl.tensor,
    q_len: gl.tensor,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    FIRST: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_M: gl.constexpr,
) -> gl.tensor:
    """COLUMNS of a tile of query rows, from the FIRST on, as they are read."""
    q_ptr, q_strides, cu_seqlens_q_ptr = queries
    threads: gl.constexpr = threads_of(COLUMNS, q_ptr.dtype.element_ty.primitive_bitwidth)
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, threads))
    cols = FIRST + gl.arange(0, COLUMNS, gl.SliceLayout(0, threads))
    return load_queries(q_ptr, q_strides, b, q_start, token, head, in_q, cu_seqlens_q_ptr, cols, HEAD_DIM)


@gluon.jit
def load_q(
    queries: gl.tuple,
    b: gl.tensor,
    row: gl.tensor,
    head_kv: gl.tensor,
    q_start: gl.tensor,
    q_len: gl.tensor,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
) -> gl.tuple:
    """A tile of query rows as it is read: all columns, or two halves of many."""
    where = (queries, b, row, head_kv, q_start, q_len)
    half: gl.constexpr = BLOCK_D // 2
    if BLOCK_D <= NARROW:
        return (load_piece(*where, GROUP, HEAD_DIM, 0, BLOCK_D, BLOCK_M),)
    else:
        return (
            load_piece(*where, GROUP, HEAD_DIM, 0, half, BLOCK_M),
            load_piece(*where, GROUP, HEAD_DIM, half, half, BLOCK_M),
        )


@gluon.jit
def as_operand(q: gl.tuple) -> gl.tuple:
    """Query rows laid out as products take them."""
    operand: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    if len(q) == 1:
        return (gl.convert_layout(q[0], operand),)
    else:
        return gl.convert_layout(q[0], operand), gl.convert_layout(q[1], operand)


@gluon.jit
def multiply_part(
    q: gl.tuple,
    scoring: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    b: gl.tensor,
    head_kv: gl.tensor,
    row: gl.tensor,
    q_len: gl.tensor,
    end: gl.tensor,
    tiles: gl.tuple,
    leaf: gl.tensor,
    is_first: gl.tensor,
    turn: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SCORES: gl.constexpr,
    LEAVES: gl.constexpr,
    STAGES: gl.constexpr,
    HIDES_FIRST: gl.constexpr,
) -> gl.tuple:
    """State (peak, total, acc) of a row tile that has seen a part, whose tiles come from ``turn`` on.

    With LEAVES each ``leaf`` of them are a state of their own, merged from left to right. With HIDES_FIRST
    products are added to what hides a key, where they can be (:func:`flash_decoding.kernels.part.scores_of`):
    for runs. The sums of even splits go on side by side without it, and it made some of these slower.
    """
    alibi_ptr, alibi_strides, sinks_ptr, scale, softcap, window_left, window_right = scoring
    _, lo, hi, first, step, count = tiles
    of_row: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, of_row)
    lanes = gl.arange(0, BLOCK_N, gl.SliceLayout(0, PRODUCT))
    peak = gl.full([BLOCK_M], float("-inf"), gl.float32, of_row)
    total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, PRODUCT)
    acc = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, PRODUCT)
    if sinks_ptr is not None:
        if is_first:  # the sink belongs to one part, so that the merge counts it once
            peak = gl.load(sinks_ptr + head, mask=in_q, other=0.0).to(gl.float32) * softmax.LOG2E
            total += (lanes == 0).to(gl.float32)[None, :]
    if LEAVES:
        peak_split = gl.full([BLOCK_M], float("-inf"), gl.float32, of_row)
        total_split = gl.zeros([BLOCK_M], gl.float32, of_row)
        acc_split = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, PRODUCT)
        next_leaf = leaf
    position = end - q_len + token
    slopes = score.slopes(alibi_ptr, alibi_strides, b, head, in_q)
    factor = score.factor(scale, SCORES)
    nothing = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, PRODUCT)
    for i in range(count):
        if LEAVES:
            if i == next_leaf:
                next_leaf += leaf
                peak, total_row, acc = softmax.gather(peak, total, acc)
                peak_split, total_split, acc_split = softmax.fold(
                    peak_split, total_split, acc_split, peak, total_row, acc
                )
                peak = gl.full([BLOCK_M], float("-inf"), gl.float32, of_row)
                total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, PRODUCT)
                acc = gl.zeros([BLOCK_M, BLOCK_DV], gl.float32, PRODUCT)
        slots = (first + i * step) * BLOCK_N + lanes
        live = (slots >= lo) & (slots < hi)
        sees = keys.row_sees(slots, live, position, window_left, window_right, BOUND_LEFT, BOUND_RIGHT)
        tile = ring.at(k_ring, turn + i, STAGES)
        if HIDES_FIRST and SCORES == score.FACTORED and not BOUND_LEFT and not BOUND_RIGHT:
            scores = multiply_keys(q, tile, gl.where(sees, nothing, float("-inf")))
        else:
            scores = multiply_keys(q, tile, nothing)
            scores = score.transform(scores, slots, position, scale, softcap, slopes, alibi_ptr, SCORES)
            scores = gl.where(sees, scores, float("-inf"))
        peak, total, alpha, p = softmax.weigh(peak, total, scores, factor)
        p = gl.convert_layout(p.to(q[0].dtype), gl.DotOperandLayout(0, PRODUCT, 2))
        acc = multiply_values(p, ring.at(v_ring, turn + i, STAGES), acc * alpha[:, None])
    peak, total_row, acc = softmax.gather(peak, total, acc)
    if LEAVES:
        peak, total_row, acc = softmax.fold(peak_split, total_split, acc_split, peak, total_row, acc)
    return peak, total_row, acc
