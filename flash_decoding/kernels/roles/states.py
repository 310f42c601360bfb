"""Two multipliers that take turns have a state each; at the end of a part one hands its own to the other.

Where one multiplier does it all there is nothing to hand over, and nothing of this is compiled in.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels import softmax

PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROWS = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))


@gluon.jit
def make(BLOCK_M: gl.constexpr, BLOCK_DV: gl.constexpr) -> gl.tuple:
    """Room for a state (peak, total, acc), and its barriers (full, free)."""
    peak = gl.allocate_shared_memory(gl.float32, [BLOCK_M], PLAIN)
    total = gl.allocate_shared_memory(gl.float32, [BLOCK_M], PLAIN)
    acc = gl.allocate_shared_memory(gl.float32, [BLOCK_M, BLOCK_DV], ROWS)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(free, count=1)
    return peak, total, acc, full, free


@gluon.jit
def hand_over(room: gl.tuple, part: gl.tensor, peak: gl.tensor, total: gl.tensor, acc: gl.tensor) -> None:
    """Leave a state for the other multiplier, when it has taken that of the part before."""
    mbarrier.wait(room[4], (part & 1) ^ 1)
    room[0].store(peak)
    room[1].store(total)
    room[2].store(acc)
    mbarrier.arrive(room[3])


@gluon.jit
def take_over(room: gl.tuple, part: gl.tensor, peak: gl.tensor, total: gl.tensor, acc: gl.tensor) -> gl.tuple:
    """The state of all tiles of a part: ours, and what the other multiplier hands over."""
    mbarrier.wait(room[3], part & 1)
    peak_other = room[0].load(peak.type.layout)
    total_other = room[1].load(total.type.layout)
    acc_other = room[2].load(acc.type.layout)
    mbarrier.arrive(room[4])
    peak_new = gl.maximum(peak, peak_other)
    pivot = softmax.pivot_of(peak_new)
    alpha, beta = gl.exp2(peak - pivot), gl.exp2(peak_other - pivot)
    return peak_new, total * alpha + total_other * beta, acc * alpha[:, None] + acc_other * beta[:, None]
