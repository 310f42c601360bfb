"""The ring of buffers between loaders and multipliers, and the two barriers of each buffer.

Tile ``turn`` of a program, counted over all its parts, is in buffer ``turn % STAGES``. Loaders wait until the
multipliers have left it, which is so at once in the first round; multipliers until it is full. A barrier's
phase is the parity of the round.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

WARP = gl.constexpr(32)


@gluon.constexpr_function
def buffer_layout(rows, keys, columns, dtype):
    """How a tile (keys, columns) lies in shared memory.

    Hopper's products of many rows read the layout of its own; for those of few, rotating the 16 bytes of a
    key by the key is faster, by half a microsecond of 18.
    """
    if rows > 16:
        return gl.NVMMASharedLayout.get_default_for([keys, columns], dtype)
    wide = 128 // dtype.primitive_bitwidth
    per_phase = max(1, 64 // columns)
    return gl.SwizzledSharedLayout(wide, per_phase, min(8, columns // wide), [1, 0])


@gluon.jit
def make(
    dtype: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
):
    """Buffers of keys and of values, and their barriers (full, free), for so many warps that load."""
    k_layout: gl.constexpr = buffer_layout(BLOCK_M, BLOCK_N, BLOCK_D, dtype)
    v_layout: gl.constexpr = buffer_layout(BLOCK_M, BLOCK_N, BLOCK_DV, dtype)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], k_layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_DV], v_layout)
    return k_ring, v_ring, barriers(STAGES, LOADERS), barriers(STAGES, LOADERS)


@gluon.jit
def barriers(STAGES: gl.constexpr, LOADERS: gl.constexpr):
    """(full, free) of a ring."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=WARP * LOADERS)  # the copies of every thread arrive by themselves
        mbarrier.init(free.index(stage), count=1)
    return full, free


@gluon.jit
def place(turn, STAGES: gl.constexpr):
    """Buffer of a tile, and the parity of its round."""
    return turn % STAGES, (turn // STAGES) & 1
