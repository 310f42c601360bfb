"""A kernel of warps with roles in which no two of them touch the same memory, for the race checker to judge.

What it reports of this kernel belongs to the way in which Triton starts groups of warps, and hands them what
they take, not to anything that kernels do.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WARPS = gl.constexpr(4)


@gluon.jit  # type: ignore[untyped-decorator]  # gluon.jit
def write_own(
    ptr: gl.tensor,
    first: gl.tensor,
    factor: gl.tensor,
    PLACE: gl.constexpr,  # noqa: N803 - a compile-time constant
) -> None:
    """Write what only this group of warps writes, and nobody reads."""
    lanes = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    gl.store(ptr + PLACE * 32 * WARPS + lanes, first + factor * lanes)


@gluon.jit  # type: ignore[untyped-decorator]  # gluon.jit
def control_kernel(ptr: gl.tensor, first: gl.tensor, factor: gl.tensor) -> None:
    first += gl.program_id(0)
    gl.warp_specialize(
        [(write_own, (ptr, first, factor, 0)), (write_own, (ptr, first, factor, 1))], [WARPS.value], [24]
    )


def launch(device: torch.device) -> None:
    """Run it with a few programs."""
    control_kernel[(3,)](torch.empty(256, dtype=torch.int32, device=device), 5, 7, num_warps=WARPS.value)
