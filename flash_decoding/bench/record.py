"""What a run leaves behind: one JSON file with every number, its circumstances, and every reason."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from flash_decoding.bench.check import Verdict
from flash_decoding.bench.column import Heading
from flash_decoding.bench.environment import without_folders
from flash_decoding.bench.timing import Effort, Timing

SCHEMA = 1
"""Version of the file's layout; it grows when a field changes its meaning."""

Status = Literal["timed", "wrong", "failed", "left out"]
REASON_LENGTH = 400


@dataclass(frozen=True)
class Cell:
    """One column in one row: a timing behind a passed check, or the reason why there is none."""

    status: Status
    reason: str = ""
    timing: Timing | None = None
    verdict: Verdict | None = None
    way: str = ""
    """Which way was the fastest, where a column has several."""
    note: str = ""

    @classmethod
    def timed(cls, timing: Timing, verdict: Verdict, *, way: str = "", note: str = "") -> Cell:
        """It passed its check and was measured."""
        return cls("timed", timing=timing, verdict=verdict, way=way, note=note)

    @classmethod
    def computed(cls, seconds: float) -> Cell:
        """Nothing ran: a time that follows from what was measured of the device."""
        return cls("timed", timing=Timing(seconds, seconds, seconds, 0, 0))

    @classmethod
    def wrong(cls, verdict: Verdict) -> Cell:
        """Its result is not the reference's; it was not measured."""
        distance = f"error {verdict.error:.2e}, allowed {verdict.budget:.2e}"
        return cls("wrong", verdict.complaint or distance, verdict=verdict)

    @classmethod
    def failed(cls, reason: str) -> Cell:
        """It raised."""
        return cls("failed", without_folders(" ".join(reason.split()))[:REASON_LENGTH])

    @classmethod
    def left_out(cls, reason: str) -> Cell:
        """It does not run here, and says so itself."""
        return cls("left out", reason)

    def to_json(self, bytes_read: int, floor_s: float | None) -> dict[str, Any]:
        """Plain values; times in microseconds, bandwidth in GB/s of what has to be read once."""
        told: dict[str, Any] = {"status": self.status, "reason": self.reason}
        if self.verdict is not None:
            told |= {"error": _finite(self.verdict.error), "allowed_error": self.verdict.budget}
        if self.timing is None:
            return told
        timing = self.timing
        return told | {
            "median_us": timing.median_s * 1e6,
            "p10_us": timing.p10_s * 1e6,
            "p90_us": timing.p90_s * 1e6,
            "samples": timing.samples,
            "calls_per_sample": timing.calls_per_sample,
            "gb_per_s": bytes_read / timing.median_s / 1e9,
            "times_floor": timing.median_s / floor_s if floor_s else None,
            "way": self.way,
            "note": self.note,
        }


@dataclass(frozen=True)
class Row(ABC):
    """One line of a table, measured. Each suite has its own, with what it is a line of."""

    cells: Mapping[str, Cell]

    @property
    @abstractmethod
    def name(self) -> str:
        """What the line is called."""

    @abstractmethod
    def to_json(self, floor: str) -> dict[str, Any]:
        """Plain values: what was measured, and every cell beside the column ``floor``."""

    def seconds(self, column: str) -> float | None:
        """Median of a column, None where it was not timed."""
        timing = self.cells[column].timing
        return None if timing is None else timing.median_s


R = TypeVar("R", bound=Row)


@dataclass
class Record(Generic[R]):
    """A run, complete or as far as it came."""

    suite: str
    title: str
    environment: Mapping[str, Any]
    columns: Sequence[Heading]
    effort: Effort
    rows: list[R] = field(default_factory=list)
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What a suite measured beside its rows, in plain values."""

    @property
    def floor(self) -> str:
        """Name of the column that the others are compared with."""
        return next(column.name for column in self.columns if column.role == "floor")

    @property
    def shown(self) -> list[Heading]:
        """The columns that have something to show in some row (a timing, or a wrong result)."""
        return [
            c for c in self.columns if any(r.cells[c.name].status in ("timed", "wrong") for r in self.rows)
        ]

    @property
    def complaints(self) -> list[str]:
        """Cells of our own that are not timed: each is a defect of ours."""
        ours = [column.name for column in self.columns if column.role == "ours"]
        return [
            f"{row.name}, {name}: {row.cells[name].status}: {row.cells[name].reason}"
            for row in self.rows
            for name in ours
            if row.cells[name].status != "timed"
        ]

    def to_json(self) -> dict[str, Any]:
        """The file's content, as plain values."""
        columns = [{"name": c.name, "about": c.about, "role": c.role} for c in self.columns]
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "title": self.title,
            "environment": dict(self.environment),
            "effort": asdict(self.effort),
            **self.extras,
            "columns": columns,
            "rows": [row.to_json(self.floor) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        """Write the file, in one step: a run that is broken off leaves the last whole one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
        draft.replace(path)


def _finite(value: float) -> float | None:
    """JSON knows no infinity: None."""
    return value if math.isfinite(value) else None
