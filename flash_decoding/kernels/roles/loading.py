"""The loaders: tiles of keys and values from the cache into the rings, as fast as buffers become free."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels.roles import ring


@gluon.constexpr_function
def threads_of(columns: int, bits: int, warps: int) -> gl.BlockedLayout:
    """Which thread copies what of a tile (keys, columns): 16 bytes each, neighbours along a key."""
    wide = 128 // bits
    along = min(ring.WARP.value, columns // wide)
    return gl.BlockedLayout([1, wide], [ring.WARP.value // along, along], [warps, 1], [1, 0])


@gluon.jit
def copy_tile(
    row_ptr: gl.tensor,
    slot_stride: gl.tensor,
    start: gl.tensor,
    lo: gl.tensor,
    hi: gl.tensor,
    into: gl.tuple,
    COLS: gl.constexpr,
    BLOCK_COLS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Start the copy of slots from ``start`` on when the buffer is free; dead ones become 0: no 0 * NaN."""
    buffer, full, free, parity = into
    threads: gl.constexpr = threads_of(BLOCK_COLS, row_ptr.dtype.element_ty.primitive_bitwidth, LOADERS)
    slots = start + gl.arange(0, BLOCK_N, gl.SliceLayout(1, threads))
    cols = gl.arange(0, BLOCK_COLS, gl.SliceLayout(0, threads))
    live = ((slots >= lo) & (slots < hi))[:, None]
    if COLS != BLOCK_COLS:
        live &= (cols < COLS)[None, :]
    source = row_ptr + (slots.to(gl.int64) * slot_stride)[:, None] + cols[None, :]
    mbarrier.wait(free, parity ^ 1)
    async_copy.async_copy_global_to_shared(buffer, source, mask=live)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def load_part(
    k_row_ptr: gl.tensor,
    v_row_ptr: gl.tensor,
    k_stride: gl.tensor,
    v_stride: gl.tensor,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    lo: gl.tensor,
    hi: gl.tensor,
    first_tile: gl.tensor,
    step: gl.tensor,
    count: gl.tensor,
    turn: gl.tensor,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Load ``count`` tiles, ``step`` apart, of slots at multiples of two strides, from ``turn`` on."""
    for i in range(count):
        start = (first_tile + i * step) * BLOCK_N
        copy_tile(
            k_row_ptr,
            k_stride,
            start,
            lo,
            hi,
            ring.at(k_ring, turn + i, STAGES),
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            LOADERS,
        )
        copy_tile(
            v_row_ptr, v_stride, start, lo, hi, ring.at(v_ring, turn + i, STAGES), HEAD_DIM_V, BLOCK_DV,
            BLOCK_N, LOADERS,
        )  # fmt: skip
