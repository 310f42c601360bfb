"""A line of the model suite's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.record import Row


@dataclass(frozen=True)
class ModelRow(Row):
    """One context, measured."""

    case: ModelCase
    weight_bytes: int
    """Bytes of the parameters that a step reads."""
    model_bytes: int
    """Bytes of all parameters."""
    peaks: Mapping[str, int]
    """Most bytes that were allocated on the GPU while a column ran; empty on a CPU."""

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def bytes_read(self) -> int:
        """Bytes of weights, keys and values that a step has to read."""
        return self.weight_bytes + self.case.kv_bytes

    def tokens_per_s(self, column: str) -> float | None:
        """Tokens of all sequences together, None where the column was not timed."""
        seconds = self.seconds(column)
        return None if seconds is None else self.case.batch / seconds

    def to_json(self, floor: str) -> dict[str, Any]:
        """Plain values: the case, the bytes, and every cell."""
        case, floor_s = self.case, self.seconds(floor)
        cells = {name: cell.to_json(self.bytes_read, floor_s) for name, cell in self.cells.items()}
        for name, told in cells.items():
            told["tokens_per_s"] = self.tokens_per_s(name)
            told["peak_bytes"] = self.peaks.get(name)
        return {
            "batch": case.batch,
            "context": case.context,
            "lengths": list(case.lengths),
            "steps_in_a_row": case.burst,
            "dtype": str(case.dtype).removeprefix("torch."),
            "bytes": self.bytes_read,
            "weight_bytes": self.weight_bytes,
            "model_bytes": self.model_bytes,
            "kv_bytes": case.kv_bytes,
            "cells": cells,
        }
