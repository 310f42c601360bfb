"""The table of the serving suite."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flash_decoding.bench.baselines import ours
from flash_decoding.bench.column import Heading
from flash_decoding.bench.record import Record
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.serving.kinds import shape_of
from flash_decoding.bench.table import entry, legend, style_of, three_digits, unit_of


def render(record: Record[AttentionRow]) -> RenderableType:
    """The table, then what the host spends where that was measured, the cases, the columns."""
    cases = [Text.assemble((row.name, "bold"), f": {shape_of(row.case)}") for row in record.rows]
    host = [Text(_host(case, told)) for case, told in record.extras.get("host_us", {}).items()]
    return Group(build_table(record), *host, *cases, *legend(record))


def build_table(record: Record[AttentionRow]) -> Table:
    """A row per case: the median of each column, then who is how far from the limit."""
    unit = unit_of(record)
    table = Table(title=f"median {unit.name} per call", title_justify="left", header_style="bold")
    table.add_column("case", no_wrap=True)
    for column in record.shown:
        table.add_column(column.name, justify="right", style=style_of(column))
    for name in ("ours / floor", "best peer / floor", "best peer", "batch invariant / ours"):
        table.add_column(name, justify="left" if name == "best peer" else "right")
    for row in record.rows:
        times = [entry(row.cells[column.name], unit.text) for column in record.shown]
        table.add_row(row.name, *times, *_ratios(row, record))
    return table


def best_peer(row: AttentionRow, columns: list[Heading]) -> str | None:
    """The fastest column of others, None where none was timed."""
    timed = {
        column.name: seconds
        for column in columns
        if column.role == "peer" and (seconds := row.seconds(column.name)) is not None
    }
    return min(timed, key=lambda name: timed[name]) if timed else None


def _host(case: str, told: dict[str, float]) -> str:
    """What a call of a tiny case costs the host, by each of those that were measured."""
    return f"host, {case}: " + ", ".join(f"{name} {us:.1f} us per call" for name, us in told.items())


def _ratios(row: AttentionRow, record: Record[AttentionRow]) -> tuple[str, str, str, str]:
    peer = best_peer(row, record.shown)
    mine = ours.PLANNED.name
    return (
        _ratio(row, mine, record.floor),
        _ratio(row, peer, record.floor),
        peer or "-",
        _ratio(row, ours.INVARIANT.name, mine),
    )


def _ratio(row: AttentionRow, name: str | None, other: str) -> str:
    """How many times as long as another column."""
    upper, lower = (row.seconds(n) if n is not None and n in row.cells else None for n in (name, other))
    return "-" if upper is None or lower is None else f"{three_digits(upper / lower)}x"
