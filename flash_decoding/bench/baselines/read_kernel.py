"""A Triton kernel that only reads: the least time in which this GPU's memory gives up the bytes."""

# ruff: noqa: N803, PLR0917 - compile-time constants of a kernel are uppercase, and it has no keywords

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read_kernel(
    k_ptr: tl.tensor,  # (words,) int32: the keys, as they lie in memory
    v_ptr: tl.tensor,  # (words,) int32: the values
    sums_ptr: tl.tensor,  # (programs,) int32
    words: tl.tensor,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
) -> None:
    """``sums[p]``: the wrapping sum of the words of blocks p, p + programs, ... of keys and values.

    Grid: (programs,). The sum makes every load count; a thread's loads are 16 bytes wide.
    """
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in tl.range(program * BLOCK, words, tl.num_programs(0) * BLOCK, num_stages=STAGES):
        offsets = start + lanes
        inside = offsets < words
        total += tl.load(k_ptr + offsets, mask=inside, other=0, eviction_policy=EVICT)
        total += tl.load(v_ptr + offsets, mask=inside, other=0, eviction_policy=EVICT)
    tl.store(sums_ptr + program, tl.sum(total))


@dataclass(frozen=True)
class Shape:
    """How the reading is shared: one of a few that are tried, the fastest of which is the floor."""

    block: int
    """Words of 4 bytes that a program reads at a time, from keys and from values each."""
    programs_per_sm: int
    """0: as many programs as there are blocks, each reading one of them."""
    num_warps: int
    stages: int
    evict: str = "evict_first"

    def programs(self, blocks: int, sm_count: int) -> int:
        """Size of the grid for so many blocks."""
        return min(blocks, self.programs_per_sm * sm_count) if self.programs_per_sm else blocks

    @property
    def constants(self) -> dict[str, Any]:
        """What a reading kernel is compiled for."""
        return {
            "BLOCK": self.block,
            "STAGES": self.stages,
            "EVICT": self.evict,
            "num_warps": self.num_warps,
        }

    @property
    def label(self) -> str:
        grid = f"{self.programs_per_sm}/SM" if self.programs_per_sm else "one block each"
        return f"{self.block * 4 // 1024} KiB, {grid}, {self.num_warps} warps, {self.stages} stages"


SHAPES = (
    Shape(block=2048, programs_per_sm=0, num_warps=4, stages=1),
    Shape(block=4096, programs_per_sm=0, num_warps=4, stages=1),
    Shape(block=4096, programs_per_sm=0, num_warps=8, stages=1),
    Shape(block=8192, programs_per_sm=0, num_warps=8, stages=1),
    Shape(block=16384, programs_per_sm=0, num_warps=16, stages=1),
    Shape(block=4096, programs_per_sm=4, num_warps=8, stages=1),
    Shape(block=8192, programs_per_sm=2, num_warps=8, stages=1),
    Shape(block=8192, programs_per_sm=4, num_warps=8, stages=1),
    Shape(block=4096, programs_per_sm=1, num_warps=8, stages=4),
    Shape(block=4096, programs_per_sm=2, num_warps=8, stages=3),
    Shape(block=2048, programs_per_sm=4, num_warps=4, stages=3),
    Shape(block=4096, programs_per_sm=4, num_warps=8, stages=1, evict=""),
)


def read(k: Tensor, v: Tensor, shape: Shape, sm_count: int) -> Tensor:
    """Read keys and values (contiguous, as many bytes each) once; return one sum per program, int32."""
    words_k, words_v = k.view(torch.int32).flatten(), v.view(torch.int32).flatten()
    words = words_k.numel()
    programs = shape.programs(triton.cdiv(words, shape.block), sm_count)
    sums = torch.empty(programs, dtype=torch.int32, device=k.device)
    read_kernel[(programs,)](words_k, words_v, sums, words, **shape.constants)
    return sums
