"""How a run goes from what is to be measured to table, record and picture, whatever the suite."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flash_decoding.bench.environment import device_name
from flash_decoding.bench.record import R, Record

Step = Callable[[str], None]
"""Told what is about to run, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Run(Generic[R]):
    """A suite, ready to go."""

    record: Record[R]
    """Still without rows."""
    measure: Callable[[Step], Iterator[R]]
    """Gives the rows one by one, each complete."""
    steps: int
    """How often it tells what it is about to do."""
    render: Callable[[Record[R]], RenderableType]
    save_plot: Callable[[Record[R], Path], None] | None
    """None: no picture is wanted."""

    def conduct(self, path: Path, console: Console) -> int:
        """Measure everything, show the table, and save record and picture.

        Returns:
            The exit status: 1 where a column of our own is wrong or failed, else 0.
        """
        record = self.record
        console.print(record.title, style="bold", soft_wrap=True)
        self._fill(path, console)
        console.print(self.render(record))
        console.print(f"record: {path}", soft_wrap=True)
        if self.save_plot is not None:
            self.save_plot(record, path.with_suffix(".png"))
            console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
        for complaint in record.complaints:
            console.print(f"defect: {complaint}", style="bold red", soft_wrap=True)
        return 1 if record.complaints else 0

    def _fill(self, path: Path, console: Console) -> None:
        """Measure row by row, with a progress bar on a terminal; the file is whole after each row."""
        bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*bars, console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task("", total=self.steps)

            def step(text: str) -> None:
                progress.update(task, advance=1, description=text)

            for row in self.measure(step):
                self.record.rows.append(row)
                self.record.save(path)


def file_name(device: torch.device, *parts: str) -> str:
    """Name of a record: the suite and other parts, the device, and when."""
    words = "-".join([*parts[:-1], device_name(device), *parts[-1:]])
    name = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return f"{name}-{stamp}.json"
