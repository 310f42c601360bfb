"""The ring of buffers between loaders and multipliers, and the two barriers of each buffer.

Tile i of a program, counted over all that it does, is in buffer ``i % STAGES``. Loaders wait until the
multipliers have left it, which is so at once in the first round; multipliers until it is full. A barrier's
phase is the parity of the round.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels.roles.gluon_names import barrier

WARP = gl.constexpr(32)


@gluon.constexpr_function
def buffer_layout(columns: int, bits: int) -> gl.SwizzledSharedLayout:
    """How a tile (keys, columns) lies in shared memory: 16 bytes at a time, turned from key to key.

    So a matrix of 8 keys is read from all banks at once; faster than the layout of Hopper's own copies.
    """
    wide = 128 // bits
    line = 1024 // bits
    return gl.SwizzledSharedLayout(wide, max(1, line // columns), min(8, columns // wide), [1, 0])


@gluon.jit
def make(
    dtype: gl.constexpr,
    BLOCK_N: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
) -> gl.tuple:
    """(buffers, their full barriers, their free barriers) for so many warps that load."""
    layout: gl.constexpr = buffer_layout(COLUMNS, dtype.primitive_bitwidth)
    buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, COLUMNS], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=WARP * LOADERS)  # every thread's copies arrive by themselves
        mbarrier.init(free.index(stage), count=1)
    return buffers, full, free


@gluon.jit
def at(ring: gl.tuple, i: gl.tensor, STAGES: gl.constexpr) -> gl.tuple:
    """Of tile i: its buffer, the full barrier, the free barrier, and the parity of its round."""
    stage = i % STAGES
    return ring[0].index(stage), ring[1].index(stage), ring[2].index(stage), (i // STAGES) & 1


@gluon.jit
def drop(ring: gl.tuple, i: gl.tensor, STAGES: gl.constexpr) -> None:
    """Let go of tile i without a look at it."""
    _, full, free, parity = at(ring, i, STAGES)
    mbarrier.wait(full, parity)
    barrier()  # all have seen it full before it may be filled again
    mbarrier.arrive(free)


@gluon.jit
def wait_until_loaded(ring: gl.tuple, i: gl.tensor, STAGES: gl.constexpr) -> None:
    """For loaders: return when tile i has come; at once if it is before the first."""
    _, full, _, parity = at(ring, gl.maximum(i, 0), STAGES)
    mbarrier.wait(full, parity, pred=i >= 0)
