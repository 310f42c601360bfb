"""The library's own columns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flash_decoding import api
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column
from flash_decoding.bench.inputs import Inputs


def _decode(num_splits: int = 0, *, batch_invariant: bool = False) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        def call() -> Tensor:
            out = api.decode_attention(
                inputs.q,
                inputs.k,
                inputs.v,
                cache_seqlens=inputs.cache_seqlens,
                block_table=inputs.block_table,
                causal=True,
                window_size=case.window_size,
                num_splits=num_splits,
                batch_invariant=batch_invariant,
            )
            return out if isinstance(out, Tensor) else out[0]

        return call

    return prepare


UNSPLIT = Column.simple(
    "ours, no split", "decode_attention(num_splits=1), lengths on the device", _decode(1), role="ours"
)
PLANNED = Column.simple(
    "ours", "decode_attention, splits chosen by the planner, lengths on the device", _decode(), role="ours"
)
INVARIANT = Column.simple(
    "ours, batch invariant",
    "decode_attention(batch_invariant=True): a sequence has the same bits whatever else is in the batch",
    _decode(batch_invariant=True),
    role="ours",
)
