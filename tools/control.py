"""Kernels of warps with roles that are right by their few lines, for the race checker to judge.

What it reports of these belongs to how Triton starts groups of warps and hands them what they take, or to how
the checker follows barriers, and it reports it of every kernel that does the same.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels.roles import ring

WARPS = gl.constexpr(4)
ROWS, COLUMNS = gl.constexpr(32), gl.constexpr(64)
STAGES, TILES = gl.constexpr(2), gl.constexpr(5)
ALONG_ROWS = gl.constexpr(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
ALONG_COLUMNS = gl.constexpr(gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1]))


@gluon.jit
def places(layout: gl.constexpr) -> gl.tensor:
    """Where the numbers of a tile are, beside each other."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return rows[:, None] * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def write_own(ptr: gl.tensor, first: gl.tensor, factor: gl.tensor, place: gl.constexpr) -> None:
    """Write what only this group of warps writes, and nobody reads."""
    at = places(ALONG_ROWS)
    gl.store(ptr + place * ROWS * COLUMNS + at, first + factor * at)


@gluon.jit
def apart_kernel(ptr: gl.tensor, first: gl.tensor, factor: gl.tensor) -> None:
    """Two groups that share nothing, beside barriers that nobody uses."""
    unused = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(unused.index(stage), count=1)
    first += gl.program_id(0)
    gl.warp_specialize(
        [(write_own, (ptr, first, factor, 0)), (write_own, (ptr, first, factor, 1))], [WARPS.value], [24]
    )


@gluon.jit
def fill(source: gl.tensor, into: gl.tuple) -> None:
    """Start the copy of a tile when its buffer is free."""
    buffer, full, free, parity = into
    mbarrier.wait(free, parity ^ 1)
    async_copy.async_copy_global_to_shared(buffer, source + places(ALONG_ROWS))
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def empty(tile: gl.tuple) -> gl.tensor:
    """Read a tile when it is there; one thread says that its buffer is free when all have done so."""
    buffer, full, free, parity = tile
    mbarrier.wait(full, parity)
    x = buffer.load(ALONG_COLUMNS)
    mbarrier.arrive(free)
    return x


@gluon.jit
def give(source: gl.tensor, ptr: gl.tensor, one: gl.tuple, other: gl.tuple) -> None:
    """Fill both rings, in turn."""
    for i in range(TILES):
        fill(source + i * ROWS * COLUMNS, ring.at(one, i, STAGES))
        fill(source + i * ROWS * COLUMNS, ring.at(other, i, STAGES))


@gluon.jit
def take(source: gl.tensor, ptr: gl.tensor, one: gl.tuple, other: gl.tuple) -> None:
    """Add up both rings, each number as often as the turn that it came in."""
    total = gl.zeros([ROWS, COLUMNS], gl.float32, ALONG_COLUMNS)
    for i in range(TILES):
        total += empty(ring.at(one, i, STAGES)) * i
        total += empty(ring.at(other, i, STAGES)) * i
    gl.store(ptr + places(ALONG_COLUMNS), total)


@gluon.jit
def hand_over_kernel(source: gl.tensor, ptr: gl.tensor) -> None:
    """One group of warps gives the other more tiles than there are buffers."""
    one = ring.make(gl.float32, ROWS, COLUMNS, STAGES, WARPS)
    other = ring.make(gl.float32, ROWS, COLUMNS, STAGES, WARPS)
    rings = (source, ptr, one, other)
    gl.warp_specialize([(take, rings), (give, rings)], [WARPS.value], [40])


def launch(device: torch.device) -> None:
    """Run both with a few programs."""
    numbers = torch.empty(2, ROWS.value, COLUMNS.value, dtype=torch.int32, device=device)
    apart_kernel[(3,)](numbers, 5, 7, num_warps=WARPS.value)
    tiles = torch.randn(TILES.value, ROWS.value, COLUMNS.value, device=device)
    total = torch.empty_like(tiles[0])
    hand_over_kernel[(1,)](tiles, total, num_warps=WARPS.value)
    turns = torch.arange(TILES.value, device=device)[:, None, None]
    torch.testing.assert_close(total, 2 * (tiles * turns).sum(0))
