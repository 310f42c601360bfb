"""The table that a run prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flash_decoding.bench.column import Heading
from flash_decoding.bench.record import Cell, R, Record
from flash_decoding.bench.row import AttentionRow

OURS_STYLE = "bold green"


@dataclass(frozen=True)
class Unit:
    """A unit of time that suits the device."""

    name: str
    per_second: float

    def text(self, seconds: float) -> str:
        """The time in this unit."""
        return three_digits(seconds * self.per_second)


def three_digits(value: float) -> str:
    """Three significant digits, or a whole number where it has more."""
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


MICROSECONDS = Unit("us", 1e6)
MILLISECONDS = Unit("ms", 1e3)


def unit_of(record: Record[R]) -> Unit:
    """Milliseconds on a CPU, microseconds on a GPU."""
    return MILLISECONDS if record.environment["device"] == "cpu" else MICROSECONDS


def render(record: Record[AttentionRow]) -> RenderableType:
    """The table, then what each column is or why it is missing."""
    return Group(build_table(record), *legend(record))


def build_table(record: Record[AttentionRow]) -> Table:
    """A row per case: the median of each column, and how far ours is from the floor."""
    unit = unit_of(record)
    table = Table(title=f"median {unit.name} per call", title_justify="left", header_style="bold")
    table.add_column("batch x length", justify="right", no_wrap=True)
    for column in record.shown:
        table.add_column(column.name, justify="right", style=style_of(column))
    ours = [column for column in record.shown if column.role == "ours"]
    for column in ours:
        table.add_column(f"{column.name} / floor", justify="right", style=style_of(column))
    for row in record.rows:
        times = [entry(row.cells[column.name], unit.text) for column in record.shown]
        table.add_row(row.name, *times, *(_times_floor(row, column, record.floor) for column in ours))
    return table


def legend(record: Record[R]) -> list[Text]:
    """One line per column: what it is, its notes; and for those without a number the reasons."""
    lines = []
    for column in record.columns:
        cells = [row.cells[column.name] for row in record.rows]
        remarks = _distinct([_remark(cell) for cell in cells])
        line = Text.assemble((column.name, style_of(column) or "bold"), f": {column.about}")
        lines += [line, *(Text(f"    {remark}", style="dim") for remark in remarks)]
    return lines


def style_of(column: Heading) -> str:
    """How rich shows a column."""
    return {"ours": OURS_STYLE, "floor": "cyan", "peer": ""}[column.role]


def entry(cell: Cell, shown: Callable[[float], str]) -> Text:
    """What a cell looks like, given how seconds are shown; a star points to the legend."""
    if cell.status == "wrong":
        return Text("WRONG", style="bold red")
    if cell.timing is None:
        return Text("-", style="dim")
    return Text(shown(cell.timing.median_s) + ("*" if cell.note else ""))


def _times_floor(row: AttentionRow, column: Heading, floor: str) -> str:
    seconds, least = row.seconds(column.name), row.seconds(floor)
    return f"{seconds / least:.2f}x" if seconds is not None and least is not None else "-"


def _remark(cell: Cell) -> str:
    if cell.status == "timed":
        return f"* {cell.note}" if cell.note else ""
    return f"{cell.status}: {cell.reason}"


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))
