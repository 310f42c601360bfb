"""What the pictures of all suites share: colours, markers, names at the end of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flash_decoding.bench.record import R, Record

OURS = "#D55E00"
FLOOR = "#000000"
PALETTE = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C6D31", "#5E4FA2", "#B2A000")
"""Colours that stay apart for colour-blind eyes (Okabe and Ito's first, markers help with the rest)."""

MARKERS = "osv^D<>Pph"
LABEL_GAP = 0.045
"""Least distance between two labels, in heights of a panel."""


def styles_of(record: Record[R]) -> dict[str, dict[str, Any]]:
    """How each column that has a timing is drawn: colour and marker of its own, and ours in front."""
    timed = [c for c in record.columns if any(row.seconds(c.name) is not None for row in record.rows)]
    peers = [column.name for column in timed if column.role == "peer"]
    return {
        column.name: _peer_style(peers.index(column.name))
        if column.role == "peer"
        else _own_style(column.name, is_floor=column.role == "floor")
        for column in timed
    }


def _peer_style(index: int) -> dict[str, Any]:
    colour, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2}


def _own_style(name: str, *, is_floor: bool) -> dict[str, Any]:
    if is_floor:
        return {"color": FLOOR, "linestyle": "--", "linewidth": 1.6}
    best = name == "ours"
    return {
        "color": OURS,
        "marker": "o",
        "markersize": 5 if best else 3,
        "linewidth": 2.6 if best else 1.4,
        "linestyle": "-" if best else ":",
        "zorder": 5,
    }


def short(length: int) -> str:
    """A length in units of 1024 where it is a multiple of that."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def label_ends(axes: Any, lines: Sequence[tuple[str, dict[str, Any], tuple[float, float]]]) -> None:
    """Write each line's name right of its end, moved up or down where names would overlap.

    Args:
        axes: the panel, with all lines drawn and the figure laid out.
        lines: for each its name, its style and the point where it ends.
    """
    to_panel = axes.transData + axes.transAxes.inverted()
    points = [to_panel.transform(end) for _, _, end in lines]
    heights = spread([float(y) for _, y in points], LABEL_GAP)
    for (name, style, _), (x, y), height in zip(lines, points, heights, strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.06, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=style["color"],
            fontsize=8.5,
            fontweight="bold" if name == "ours" else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.5, "alpha": 0.6},
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
