"""The picture of the serving suite: each column's time in multiples of the floor, a line for each case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flash_decoding.bench.drawing import FLOOR, styles_of
from flash_decoding.bench.extra import require
from flash_decoding.bench.record import Record
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.serving.kinds import shape_of

Points = list[tuple[float, int]]


def points_of(record: Record[AttentionRow]) -> dict[str, Points]:
    """For each timed column but the floor: (times the floor, number of the row)."""
    found: dict[str, Points] = {}
    for number, row in enumerate(record.rows):
        floor = row.seconds(record.floor)
        for column in record.columns:
            seconds = row.seconds(column.name)
            if floor is not None and seconds is not None and column.name != record.floor:
                found.setdefault(column.name, []).append((seconds / floor, number))
    return found


def save_plot(record: Record[AttentionRow], path: Path) -> None:
    """Draw a record into a PNG file: left is fast, and the floor stands at 1.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    count, styles = len(record.rows), styles_of(record)
    figure = Figure(figsize=(13, 2.4 + 0.42 * count), dpi=150, layout="constrained")
    figure.suptitle(record.title, fontsize=11)
    axes = figure.subplots()
    axes.axvline(1.0, color=FLOOR, linestyle="--", linewidth=1.4, label="floor")
    for name, points in points_of(record).items():
        axes.plot(*zip(*points, strict=True), label=name, **_dots(name, styles[name]))
    _dress(axes, record)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _dots(name: str, style: dict[str, Any]) -> dict[str, Any]:
    """The column's colour and marker without lines; ours larger, its other modes hollow."""
    is_best = name == "ours"
    dots = {"linestyle": "none", "color": style["color"], "marker": style["marker"]}
    dots |= {"markersize": 10 if is_best else 7, "zorder": style.get("zorder", 3) + is_best}
    return dots | ({"markerfacecolor": "none", "markersize": 12} if name.startswith("ours,") else {})


def _dress(axes: Any, record: Record[AttentionRow]) -> None:
    """Names of the cases on the left, what they are below each, ratios on the axis; the first case on top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = record.rows
    labels = [f"{row.name}\n{shape_of(row.case)}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8, labeltop=True)
    axes.set_xlabel("times the floor: the time to read the same keys and values once (log scale)")
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
