"""The reading kernel where the bytes lie in pieces: pages in no order, slices of longer sequences."""

# ruff: noqa: N803, PLR0917 - compile-time constants of a kernel are uppercase, and it has no keywords

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_decoding.bench.baselines.read_kernel import Shape
from flash_decoding.bench.cases import Case
from flash_decoding.bench.inputs import Inputs, runs_of


@triton.jit
def read_runs_kernel(
    k_ptr: tl.tensor,  # (words,) int32: the keys, as they lie in memory
    v_ptr: tl.tensor,  # (words,) int32: the values
    starts_ptr: tl.tensor,  # (blocks,) int64: first word of each block, a multiple of 4
    counts_ptr: tl.tensor,  # (blocks,) int32: its words, a multiple of 4, at most BLOCK
    sums_ptr: tl.tensor,  # (programs,) int32
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EVICT: tl.constexpr,
) -> None:
    """``sums[p]``: the wrapping sum of the words of blocks p, p + programs, ... of keys and values.

    Grid: (programs,). A thread's loads are 16 bytes wide.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=STAGES):
        start = tl.multiple_of(tl.load(starts_ptr + block), 4)
        inside = lanes < tl.multiple_of(tl.load(counts_ptr + block), 4)
        total += tl.load(k_ptr + start + lanes, mask=inside, other=0, eviction_policy=EVICT)
        total += tl.load(v_ptr + start + lanes, mask=inside, other=0, eviction_policy=EVICT)
    tl.store(sums_ptr + program, tl.sum(total))


@dataclass(frozen=True, eq=False)
class Blocks:
    """What is read, cut into blocks."""

    starts: Tensor
    """(blocks,) int64, in words of 4 bytes."""
    counts: Tensor
    """(blocks,) int32."""

    @classmethod
    def of(cls, case: Case, inputs: Inputs, block: int) -> Blocks:
        """Cut what somebody sees into blocks of at most ``block`` words, none of them across two runs."""
        words = case.heads_kv * case.head_dim * case.dtype.itemsize // 4
        runs = [(first * words, (first + slots) * words) for first, slots in runs_of(case, inputs)]
        pieces = [(at, min(block, stop - at)) for start, stop in runs for at in range(start, stop, block)]
        starts, counts = zip(*pieces, strict=True)
        device = inputs.k.device
        return cls(
            torch.tensor(starts, dtype=torch.int64, device=device),
            torch.tensor(counts, dtype=torch.int32, device=device),
        )


def read(inputs: Inputs, blocks: Blocks, shape: Shape, sm_count: int) -> Tensor:
    """Read the blocks of keys and values once; return one sum per program, int32."""
    words_k, words_v = (x.view(torch.int32).flatten() for x in (inputs.k, inputs.v))
    count = blocks.starts.numel()
    programs = shape.programs(count, sm_count)
    sums = torch.empty(programs, dtype=torch.int32, device=inputs.k.device)
    read_runs_kernel[(programs,)](
        words_k, words_v, blocks.starts, blocks.counts, sums, count, **shape.constants
    )
    return sums
