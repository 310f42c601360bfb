"""The picture of a run: time and achieved bandwidth against length, with the floor drawn in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_decoding.bench.drawing import label_ends, short, styles_of
from flash_decoding.bench.extra import require
from flash_decoding.bench.record import Record
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.table import unit_of


@dataclass(frozen=True)
class Line:
    """A column, drawn."""

    name: str
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    gb_per_s: tuple[float, ...]
    style: dict[str, Any]


def lines_of(record: Record[AttentionRow]) -> list[Line]:
    """One line per column that has a timing, each with its own colour and marker; ours in front."""
    lines = []
    styles = styles_of(record)
    for name, style in styles.items():
        points = [
            (row.case.kv_len, seconds, row.case.kv_bytes / seconds / 1e9)
            for row in sorted(record.rows, key=lambda row: row.case.kv_len)
            if (seconds := row.seconds(name)) is not None
        ]
        lengths, seconds_of, bandwidth = zip(*points, strict=True)
        lines.append(Line(name, lengths, seconds_of, bandwidth, style))
    return lines


def save_plot(record: Record[AttentionRow], path: Path) -> None:
    """Draw a record into a PNG file.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    lines, unit = lines_of(record), unit_of(record)
    figure = Figure(figsize=(14, 6), dpi=150, layout="constrained")
    figure.suptitle(record.title, fontsize=11)
    times, bandwidth = figure.subplots(1, 2)
    for line in lines:
        times.plot(line.lengths, [s * unit.per_second for s in line.seconds], **line.style)
        bandwidth.plot(line.lengths, line.gb_per_s, **line.style)
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    bandwidth.set_ylim(bottom=0)
    _dress(times, record, f"time per call, {unit.name}")
    _dress(bandwidth, record, "keys and values read, GB/s")
    figure.draw_without_rendering()
    label_ends(times, [_end(line, line.seconds[-1] * unit.per_second) for line in lines])
    label_ends(bandwidth, [_end(line, line.gb_per_s[-1]) for line in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _end(line: Line, value: float) -> tuple[str, dict[str, Any], tuple[float, float]]:
    return line.name, line.style, (line.lengths[-1], value)


def _dress(axes: Any, record: Record[AttentionRow], quantity: str) -> None:
    """Scale, ticks and names of a panel; each length is written with the batch that goes with it."""
    cases = {row.case.kv_len: row.case.batch for row in record.rows}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases), [f"{short(n)}\n{batch}" for n, batch in cases.items()], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("length of each sequence, and how many (below)")
    axes.set_title(quantity, loc="left", fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
