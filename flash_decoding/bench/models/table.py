"""The table of the model suite."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.record import Record
from flash_decoding.bench.table import entry, legend, style_of, three_digits


def render(record: Record[ModelRow]) -> RenderableType:
    """The table, then what each column is or why it is missing."""
    return Group(build_table(record), *legend(record))


def build_table(record: Record[ModelRow]) -> Table:
    """A row per context: tokens per second of each column, and what ours makes of the bound."""
    table = Table(title="tokens/s (from the median step)", title_justify="left", header_style="bold")
    table.add_column("batch x context", justify="right", no_wrap=True)
    for column in record.shown:
        table.add_column(column.name, justify="right", style=style_of(column))
    for name in ("ours / bound", "ours, ms", "GB a step"):
        table.add_column(name, justify="right")
    for row in record.rows:
        batch = row.case.batch
        cells = [
            entry(row.cells[column.name], lambda seconds, batch=batch: three_digits(batch / seconds))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            for column in record.shown
        ]
        table.add_row(row.name, *cells, *_sums(row, record.floor))
    return table


def _sums(row: ModelRow, floor: str) -> list[str]:
    gigabytes = three_digits(row.bytes_read / 1e9)
    ours, bound = (row.seconds(name) if name in row.cells else None for name in ("ours", floor))
    if ours is None or bound is None:
        return ["-", "-", gigabytes]
    return [f"{bound / ours:.0%}", three_digits(ours * 1e3), gigabytes]
