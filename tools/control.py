"""Kernels of warps with roles that are right by their few lines, for the race checker to judge.

What it reports of these belongs to how Triton starts groups of warps and hands them what they take, or to how
the checker follows barriers, and it reports it of every kernel that does the same. The library's steps, whose
order is in question, are written anew here: a fault of theirs is not to be the control's, too.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.gluon_names import async_load
from flash_decoding.kernels.roles.multiplying import PRODUCT

WARPS = gl.constexpr(4)
SIZE = gl.constexpr(64)
STAGES, TILES = gl.constexpr(2), gl.constexpr(40)
LANES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def places(ROWS: gl.constexpr, layout: gl.constexpr) -> gl.tensor:  # noqa: N803 - a compile-time constant
    """Where the numbers of (ROWS, SIZE) are, beside each other."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    return rows[:, None] * SIZE + gl.arange(0, SIZE, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def write_own(ptr: gl.tensor, first: gl.tensor, factor: gl.tensor, place: gl.constexpr) -> None:
    """Write what only this group of warps writes, and nobody reads."""
    at = places(SIZE, LANES)
    gl.store(ptr + place * SIZE * SIZE + at, first + factor * at)


@gluon.jit
def apart_kernel(ptr: gl.tensor, first: gl.tensor, factor: gl.tensor) -> None:
    """Two groups that share nothing, beside barriers that nobody uses."""
    unused = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(unused.index(stage), count=1)
    first += gl.program_id(0)
    gl.warp_specialize(
        [(write_own, (ptr, first, factor, 0)), (write_own, (ptr, first, factor, 1))], [WARPS.value], [48]
    )


@gluon.jit
def fill(source: gl.tensor, into: gl.tuple) -> None:
    """Start the copy of a tile when its buffer is free."""
    buffer, full, free, parity = into
    mbarrier.wait(free, parity ^ 1)
    async_load(buffer, source + places(SIZE, LANES))
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def sums_of(tile: gl.tuple, TURNED: gl.constexpr) -> gl.tensor:  # noqa: N803 - a compile-time constant
    """Add up the columns of a tile, or its rows, when it is there; each number by products of Ampere.

    One thread says that the buffer is free when all have read it.
    """
    buffer, full, free, parity = tile
    if TURNED:
        buffer = buffer.permute((1, 0))
    mbarrier.wait(full, parity)
    x = buffer.load(gl.DotOperandLayout(1, PRODUCT, 2))
    mbarrier.arrive(free)
    ones = gl.full([16, SIZE], 1.0, gl.float16, gl.DotOperandLayout(0, PRODUCT, 2))
    return mma_v2(ones, x, gl.zeros([16, SIZE], gl.float32, PRODUCT))


@gluon.jit
def give(source: gl.tensor, ptr: gl.tensor, one: gl.tuple, other: gl.tuple) -> None:
    """Fill both rings, in turn."""
    for i in range(TILES):
        fill(source + i * SIZE * SIZE, ring.at(one, i, STAGES))
        fill(source + i * SIZE * SIZE, ring.at(other, i, STAGES))


@gluon.jit
def take(source: gl.tensor, ptr: gl.tensor, one: gl.tuple, other: gl.tuple) -> None:
    """Take all out of both rings, each tile as often as the turn that it came in."""
    total = gl.zeros([16, SIZE], gl.float32, PRODUCT)
    for i in range(TILES):
        total += sums_of(ring.at(one, i, STAGES), True) * i
        total += sums_of(ring.at(other, i, STAGES), False) * i
    gl.store(ptr + places(16, PRODUCT), total)


@gluon.jit
def hand_over_kernel(source: gl.tensor, ptr: gl.tensor) -> None:
    """One group of warps gives the other more tiles than there are buffers."""
    one = ring.make(gl.float16, SIZE, SIZE, STAGES, WARPS)
    other = ring.make(gl.float16, SIZE, SIZE, STAGES, WARPS)
    rings = (source, ptr, one, other)
    gl.warp_specialize([(take, rings), (give, rings)], [WARPS.value], [40])


def launch(device: torch.device) -> None:
    """Run both with a few programs; with many tiles, for of rings it takes the checker a while to report."""
    numbers = torch.empty(2, SIZE.value, SIZE.value, dtype=torch.int32, device=device)
    apart_kernel[(3,)](numbers, 5, 7, num_warps=WARPS.value)
    tiles = torch.randint(-9, 9, (TILES.value, SIZE.value, SIZE.value), device=device).half()
    total = torch.empty(16, SIZE.value, device=device)
    hand_over_kernel[(8,)](tiles, total, num_warps=WARPS.value)
    sums = tiles.float().sum(2) + tiles.float().sum(1)
    turns = torch.arange(TILES.value, device=device)[:, None]
    torch.testing.assert_close(total, (sums * turns).sum(0).expand_as(total))
