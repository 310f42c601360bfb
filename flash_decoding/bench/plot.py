"""The picture of a run: time and achieved bandwidth against length, with the floor drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_decoding.bench.extra import require
from flash_decoding.bench.record import Record
from flash_decoding.bench.table import unit_of

OURS = "#D55E00"
FLOOR = "#000000"
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C6D31", "#5E4FA2", "#B2A000")
"""Colours that stay apart for colour-blind eyes (Okabe and Ito's first, markers help with the rest)."""

MARKERS = "osv^D<>Pph"
LABEL_GAP = 0.045
"""Least distance between two labels, in heights of a panel."""


@dataclass(frozen=True)
class Line:
    """A column, drawn."""

    name: str
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    gb_per_s: tuple[float, ...]
    style: dict[str, Any]


def lines_of(record: Record) -> list[Line]:
    """One line per column that has a timing, each with its own colour and marker; ours in front."""
    lines = []
    peers = 0
    for column in record.columns:
        points = [
            (row.case.kv_len, seconds, row.case.kv_bytes / seconds / 1e9)
            for row in sorted(record.rows, key=lambda row: row.case.kv_len)
            if (seconds := row.seconds(column.name)) is not None
        ]
        if not points:
            continue
        if column.role == "peer":
            style = _peer_style(peers)
            peers += 1
        else:
            style = _own_style(column.name, is_floor=column.role == "floor")
        lengths, seconds_of, bandwidth = zip(*points, strict=True)
        lines.append(Line(column.name, lengths, seconds_of, bandwidth, style))
    return lines


def _peer_style(index: int) -> dict[str, Any]:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}


def _own_style(name: str, *, is_floor: bool) -> dict[str, Any]:
    if is_floor:
        return {"color": FLOOR, "linestyle": "--", "linewidth": 1.6}
    split = name == "ours"
    return {
        "color": OURS,
        "marker": "o",
        "markersize": 5 if split else 3,
        "linewidth": 2.6 if split else 1.4,
        "linestyle": "-" if split else ":",
        "zorder": 5,
    }


def save_plot(record: Record, path: Path) -> None:
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
    _label_ends(times, lines, [line.seconds[-1] * unit.per_second for line in lines])
    _label_ends(bandwidth, lines, [line.gb_per_s[-1] for line in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _dress(axes: Any, record: Record, quantity: str) -> None:
    """Scale, ticks and names of a panel; each length is written with the batch that goes with it."""
    cases = {row.case.kv_len: row.case.batch for row in record.rows}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases), [f"{_short(n)}\n{batch}" for n, batch in cases.items()], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("length of each sequence, and how many (below)")
    axes.set_title(quantity, loc="left", fontsize=10)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _label_ends(axes: Any, lines: Sequence[Line], ends: Sequence[float]) -> None:
    """Write each line's name right of its end, moved up or down where names would overlap."""
    to_panel = axes.transData + axes.transAxes.inverted()
    points = [to_panel.transform((line.lengths[-1], end)) for line, end in zip(lines, ends, strict=True)]
    heights = spread([float(y) for _, y in points], LABEL_GAP)
    for line, (x, y), height in zip(lines, points, heights, strict=True):
        axes.annotate(
            line.name,
            xy=(x, y),
            xytext=(1.06, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=line.style["color"],
            fontsize=8.5,
            fontweight="bold" if line.name == "ours" else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": line.style["color"], "linewidth": 0.5, "alpha": 0.6},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved apart until neighbours are ``gap`` apart, in their order, as little as needed.

    Neighbours too close form a block that is centred on the mean of what it holds, but not below 0; blocks
    that meet join.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) - _top(blocks[-2], heights, gap) < gap:
            last = blocks.pop()
            blocks[-1] += last
    placed = [0.0] * len(heights)
    for block in blocks:
        bottom = _bottom(block, heights, gap)
        for step, index in enumerate(block):
            placed[index] = bottom + step * gap
    return placed


def _bottom(block: Sequence[int], heights: Sequence[float], gap: float) -> float:
    centred = sum(heights[i] for i in block) / len(block) - gap * (len(block) - 1) / 2
    return max(centred, 0.0)


def _top(block: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)
