"""The read floor: the time to read the same keys and values once and do nothing with them.

Only what some query token sees is read: the live tokens of ragged sequences, the end of them behind a window.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column, Way
from flash_decoding.bench.inputs import Inputs, runs_of


def _in_one_piece(case: Case) -> bool:
    """Whether all that lies in k and v is read."""
    return not case.page_size and set(case.visible) == {(0, case.kv_len)}


def _cpu_way(label: str, word: torch.dtype, pieces: int) -> Way:
    """PyTorch's sum over keys and values as integer words, on the whole or in pieces."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        if not _in_one_piece(case):
            return _sum_runs(case, inputs, word)
        k, v = (x.view(word).view(pieces, -1) for x in (inputs.k, inputs.v))

        def call() -> Tensor:
            return torch.stack((k.sum(1, dtype=word), v.sum(1, dtype=word)))

        return call

    return Way(label, prepare)


def _sum_runs(case: Case, inputs: Inputs, word: torch.dtype) -> Call:
    """Sums of what is seen, run by run; of sequences in pages that of the pool, less the unused tails."""
    if case.window or not case.page_size:
        runs = [slice(first, first + slots) for first, slots in runs_of(case, inputs)]
        spans = [x.view(word).flatten(0, 1)[run] for x in (inputs.k, inputs.v) for run in runs]
        return lambda: torch.stack([span.sum(dtype=word) for span in spans])
    hidden = [x.view(word) for b in range(case.batch) for x in _unseen(case, inputs, b)]
    pools = [x.view(word) for x in (inputs.k, inputs.v)]

    def call() -> Tensor:
        return torch.stack([x.sum(dtype=word) for x in pools] + [-x.sum(dtype=word) for x in hidden])

    return call


def _unseen(case: Case, inputs: Inputs, b: int) -> Iterator[Tensor]:
    """The tail of the last page of a sequence, of keys and of values, as views."""
    assert inputs.block_table is not None, "pages are known"
    page, used = divmod(case.live[b] - 1, case.page_size)
    number = int(inputs.block_table[b, page])
    for x in (inputs.k, inputs.v):
        yield x[number, used + 1 :]


def _cuda_ways() -> tuple[Way, ...]:
    from flash_decoding.bench.baselines import read_kernel, read_kernel_runs

    def way(shape: read_kernel.Shape) -> Way:
        def prepare(case: Case, inputs: Inputs) -> Call:
            sm_count = torch.cuda.get_device_properties(case.device).multi_processor_count
            if _in_one_piece(case):
                return lambda: read_kernel.read(inputs.k, inputs.v, shape, sm_count)
            blocks = read_kernel_runs.Blocks.of(case, inputs, shape.block)
            return lambda: read_kernel_runs.read(inputs, blocks, shape, sm_count)

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
