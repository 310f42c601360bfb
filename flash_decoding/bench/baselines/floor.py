"""The read floor: the time to read the same keys and values once and do nothing with them."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.bench.cases import Case, Inputs
from flash_decoding.bench.column import Call, Column, Way


def _cpu_way(label: str, word: torch.dtype, pieces: int) -> Way:
    """PyTorch's sum over keys and values as integer words, on the whole or in pieces."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        k, v = (x.view(word).view(pieces, -1) for x in (inputs.k, inputs.v))

        def call() -> Tensor:
            return torch.stack((k.sum(1, dtype=word), v.sum(1, dtype=word)))

        return call

    return Way(label, prepare)


def _cuda_ways() -> tuple[Way, ...]:
    from flash_decoding.bench.baselines import read_kernel

    def way(shape: read_kernel.Shape) -> Way:
        def prepare(case: Case, inputs: Inputs) -> Call:
            sm_count = torch.cuda.get_device_properties(case.device).multi_processor_count
            return lambda: read_kernel.read(inputs.k, inputs.v, shape, sm_count)

        return Way(shape.label, prepare)

    return tuple(way(shape) for shape in read_kernel.SHAPES)


CPU_WAYS = (
    _cpu_way("sum of 8-byte words", torch.int64, 1),
    _cpu_way("sum of 4-byte words", torch.int32, 1),
    _cpu_way("sums of 8-byte words in 8 pieces", torch.int64, 8),
)


def floor_column(device: torch.device) -> Column:
    """The floor on a device; the Triton kernel is imported only where there is a GPU to run it."""
    if device.type == "cuda":
        about = "a Triton kernel that only reads K and V, the fastest of several shapes, launch included"
        return Column("floor", about, "floor", _cuda_ways())
    return Column("floor", "PyTorch's fastest plain sum over K and V", "floor", CPU_WAYS)
