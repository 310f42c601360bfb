"""The library's own columns."""

from __future__ import annotations

from torch import Tensor

from flash_decoding import api
from flash_decoding.bench.cases import Case, Inputs
from flash_decoding.bench.column import Call, Column


def _prepare(num_splits: int, inputs: Inputs) -> Call:
    def call() -> Tensor:
        out = api.decode_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            cache_seqlens=inputs.cache_seqlens,
            causal=True,
            num_splits=num_splits,
        )
        return out if isinstance(out, Tensor) else out[0]

    return call


def _unsplit(case: Case, inputs: Inputs) -> Call:
    return _prepare(1, inputs)


def _planned(case: Case, inputs: Inputs) -> Call:
    return _prepare(0, inputs)


UNSPLIT = Column.simple(
    "ours, no split", "decode_attention(num_splits=1), lengths on the device", _unsplit, role="ours"
)
PLANNED = Column.simple(
    "ours", "decode_attention, splits chosen by the planner, lengths on the device", _planned, role="ours"
)
