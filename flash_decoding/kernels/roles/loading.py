"""The loaders: tiles of keys and values from the cache into the ring, as fast as buffers become free."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels import load
from flash_decoding.kernels.roles import ring


@gluon.constexpr_function
def layout_of(columns, element_bytes, warps):  # noqa: ANN001, ANN201
    """Threads of a tile (keys, columns): 16 bytes each, neighbours along a key."""
    wide = 16 // element_bytes
    along = min(32, columns // wide)
    return gl.BlockedLayout([1, wide], [32 // along, along], [warps, 1], [1, 0])


@gluon.jit
def copy_tile(buffer, full, base, page, slot, live, strides, cols, COLS: gl.constexpr, BLOCK: gl.constexpr):
    """Start the copy of one tile; dead slots and padding columns become 0: no 0 * NaN."""
    rows = page * strides[0] + slot * strides[1]
    mask = live[:, None]
    if COLS != BLOCK:
        mask &= (cols < COLS)[None, :]
    async_copy.async_copy_global_to_shared(buffer, base + (rows[:, None] + cols[None, :]), mask=mask)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def load_part(
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
    cache_row,
    lo,
    hi,
    first_tile,
    step,
    count,
    turn,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
):
    """Load ``count`` tiles, ``step`` apart, into the ring from ``turn`` on.

    The table entries of a tile are asked for one tile ahead, to be there when its buffer is.
    """
    element: gl.constexpr = k_base.dtype.element_ty.primitive_bitwidth // 8
    k_layout: gl.constexpr = layout_of(BLOCK_D, element, LOADERS)
    v_layout: gl.constexpr = layout_of(BLOCK_DV, element, LOADERS)
    lanes = gl.arange(0, BLOCK_N, gl.SliceLayout(1, k_layout))
    k_cols = gl.arange(0, BLOCK_D, gl.SliceLayout(0, k_layout))
    v_cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, v_layout))
    start = first_tile * BLOCK_N
    last = gl.maximum(hi - 1, 0)
    page, slot = load.place(
        cache_row, gl.minimum(start, last), lanes, hi, block_table_ptr, table_stride, pool_pages, PAGE_SIZE,
        BLOCK_N,
    )  # fmt: skip
    for i in range(count):
        stage, parity = ring.place(turn + i, STAGES)
        slots = start + lanes
        live = (slots >= lo) & (slots < hi)
        mbarrier.wait(k_barriers[1].index(stage), parity ^ 1)
        copy_tile(
            k_ring.index(stage), k_barriers[0].index(stage), k_base, page, slot, live, k_strides, k_cols,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        v_page, v_slot, v_live = page, slot, live
        if BLOCK_D != BLOCK_DV:
            v_slot = gl.convert_layout(slot, gl.SliceLayout(1, v_layout))
            v_live = gl.convert_layout(live, gl.SliceLayout(1, v_layout))
            if PAGE_SIZE % BLOCK_N != 0:
                v_page = gl.convert_layout(page, gl.SliceLayout(1, v_layout))
        mbarrier.wait(v_barriers[1].index(stage), parity ^ 1)
        copy_tile(
            v_ring.index(stage), v_barriers[0].index(stage), v_base, v_page, v_slot, v_live, v_strides,
            v_cols, HEAD_DIM_V, BLOCK_DV,
        )  # fmt: skip
        start += step * BLOCK_N
        if PAGE_SIZE == 0:
            slot += step * BLOCK_N
        else:
            page, slot = load.place(
                cache_row, gl.minimum(start, last), lanes, hi, block_table_ptr, table_stride, pool_pages,
                PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
    return turn + count
