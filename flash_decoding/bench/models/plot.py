"""The picture of the model suite: tokens per second over context, with the bound drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_decoding.bench.drawing import label_ends, short, styles_of
from flash_decoding.bench.extra import require
from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.record import Record

Points = list[tuple[int, float]]


def save_plot(record: Record[ModelRow], path: Path) -> None:
    """Draw a record into a PNG file, with a panel for each batch.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    batches = sorted({row.case.batch for row in record.rows})
    figure = Figure(figsize=(9 * len(batches), 6), dpi=150, layout="constrained")
    figure.suptitle(record.title, fontsize=11)
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    styles = styles_of(record)
    drawn = []
    for axes, batch in zip(panels, batches, strict=True):
        rows = [row for row in record.rows if row.case.batch == batch]
        lines = {name: points for name in styles if (points := points_of(rows, name))}
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), **styles[name])
        _dress(axes, rows, batch)
        drawn.append((axes, [(name, styles[name], points[-1]) for name, points in lines.items()]))
    figure.draw_without_rendering()
    for axes, ends in drawn:
        label_ends(axes, ends)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def points_of(rows: Sequence[ModelRow], column: str) -> Points:
    """(context, tokens per second) of a column where it was timed, in the order of contexts."""
    points = [(row.case.context, row.tokens_per_s(column)) for row in rows]
    return sorted((context, speed) for context, speed in points if speed is not None)


def _dress(axes: Any, rows: Sequence[ModelRow], batch: int) -> None:
    contexts = sorted(row.case.context for row in rows)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [short(context) for context in contexts], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")
    axes.set_title(f"tokens/s, batch {batch}", loc="left", fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
