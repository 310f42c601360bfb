"""A line of the attention suite's table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flash_decoding.bench.cases import Case
from flash_decoding.bench.record import Row


@dataclass(frozen=True)
class AttentionRow(Row):
    """One case, measured."""

    case: Case
    sets: int
    """Input sets that the calls rotated over."""
    checked: int
    """Sequences of the first set that were compared with the reference."""

    @property
    def name(self) -> str:
        return self.case.name

    def to_json(self, floor: str) -> dict[str, Any]:
        """Plain values: the case, what was rotated over, and every cell."""
        case = self.case
        floor_s = self.seconds(floor)
        return {
            "name": case.name,
            "batch": case.batch,
            "kv_len": case.kv_len,
            "q_len": case.q_len,
            "heads_q": case.heads_q,
            "heads_kv": case.heads_kv,
            "head_dim": case.head_dim,
            "lengths": list(case.lengths),
            "page_size": case.page_size,
            "window": case.window,
            "dtype": case.dtype_name,
            "bytes": case.kv_bytes,
            "sets": self.sets,
            "rotated_bytes": self.sets * case.kv_bytes,
            "checked_sequences": self.checked,
            "cells": {name: cell.to_json(case.kv_bytes, floor_s) for name, cell in self.cells.items()},
        }
