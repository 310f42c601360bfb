"""The attention suite: in each row every column is prepared, checked, and timed in turn with the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console, RenderableType

from flash_decoding.bench.capture import Ready, make_ready
from flash_decoding.bench.cases import Case, set_count
from flash_decoding.bench.check import Truth, Verdict
from flash_decoding.bench.column import Column, Way
from flash_decoding.bench.conduct import Run, Step, file_name
from flash_decoding.bench.device import cache_bytes, failures, release_memory
from flash_decoding.bench.inputs import Inputs, make_inputs
from flash_decoding.bench.record import Cell, Record
from flash_decoding.bench.request import Request
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.timing import Effort, measure

CONTEST = Effort(budget_s=0.02, min_samples=3, max_samples=20, warmups=1)
"""Effort for choosing among the ways of one column."""


def effort_of(device: torch.device, *, quick: bool) -> Effort:
    """How long to measure: ten rows of all columns take little more than a minute on two CPU cores."""
    budget_s, fewest = (0.4, 3) if device.type == "cpu" else (0.15, 20)
    return Effort(budget_s=budget_s / 4 if quick else budget_s, min_samples=fewest)


@dataclass(frozen=True, eq=False)
class _Contender:
    """One way of a column that passed the gate and can be timed."""

    ready: Ready
    verdict: Verdict
    way: str


@dataclass(frozen=True, eq=False)
class _Bout:
    """What the columns of one row share."""

    case: Case
    sets: list[Inputs]
    truth: Truth


def conduct(
    record: Record[AttentionRow],
    cases: Sequence[Case],
    columns: Sequence[Column],
    request: Request,
    console: Console,
    *,
    render: Callable[[Record[AttentionRow]], RenderableType],
    save_plot: Callable[[Record[AttentionRow], Path], None],
) -> int:
    """Fill the record of one of the attention suites with these rows, show it, save it with its picture.

    Returns:
        The exit status: 1 where a column of our own is wrong or failed, else 0.
    """
    suite = Run(
        record=record,
        measure=lambda step: run(cases, columns, record.effort, step),
        steps=len(cases) * (len(columns) + 1),
        render=render,
        save_plot=save_plot if request.plot else None,
    )
    name = file_name(cases[0].device, record.suite, cases[0].dtype_name)
    return suite.conduct(request.out / name, console)


def run(
    cases: Sequence[Case], columns: Sequence[Column], effort: Effort, step: Step = lambda _: None
) -> Iterator[AttentionRow]:
    """Measure the rows one by one; each is complete when it comes.

    A column that does not run a row, raises, or gives a wrong result gets a cell that says so, and the other
    columns are measured all the same. ``step`` is called ``len(columns) + 1`` times for each row.
    """
    for case in cases:
        yield _run_case(case, columns, effort, step)
        release_memory(case.device)


def _run_case(case: Case, columns: Sequence[Column], effort: Effort, step: Step) -> AttentionRow:
    count = set_count(case, cache_bytes(case.device))
    sets = [make_inputs(case, seed=seed) for seed in range(count)]
    bout = _Bout(case, sets, Truth.of(case, sets[0]))
    entries: dict[str, _Contender | Cell] = {}
    for column in columns:
        step(f"{case.name}: {column.name}")
        entries[column.name] = _enter(column, bout)
    contenders = {name: entry for name, entry in entries.items() if isinstance(entry, _Contender)}
    step(f"{case.name}: timing")
    timings = measure({name: entry.ready.burst for name, entry in contenders.items()}, effort)
    cells = {
        name: entry
        if isinstance(entry, Cell)
        else Cell.timed(timings[name], entry.verdict, way=entry.way, note=entry.ready.note)
        for name, entry in entries.items()
    }
    return AttentionRow(cells, case, count, len(bout.truth.rows))


def _enter(column: Column, bout: _Bout) -> _Contender | Cell:
    """Prepare and check every way of a column; the fastest of those that pass goes on."""
    reason = column.why_not(bout.case)
    if reason is not None:
        return Cell.left_out(reason)
    tried = [_try(way, column, bout) for way in column.ways]
    passed = {entry.way: entry for entry in tried if isinstance(entry, _Contender)}
    if not passed:
        return next(entry for entry in tried if isinstance(entry, Cell))
    if len(passed) == 1:
        return next(iter(passed.values()))
    timings = measure({label: entry.ready.burst for label, entry in passed.items()}, CONTEST)
    return passed[min(timings, key=lambda label: timings[label].median_s)]


def _try(way: Way, column: Column, bout: _Bout) -> _Contender | Cell:
    """Prepare one way and compare its result with the reference, as called and as it will be timed.

    Whatever a contender raises is recorded as the reason why its cell is empty: one library that is broken
    or refuses a shape must not cost the whole table.
    """
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            return _admit(way, column, bout)
        except failures(bout.case.device) as error:
            hints = [str(warning.message) for warning in told]
            return Cell.failed("; ".join([f"{type(error).__name__}: {error}", *hints]))


def _admit(way: Way, column: Column, bout: _Bout) -> _Contender | Cell:
    calls = [way.prepare(bout.case, inputs) for inputs in bout.sets]
    verdict = bout.truth.judge(column.role, calls[0]())
    if not verdict.passed:
        return Cell.wrong(verdict)
    ready = make_ready(calls, bout.case.device)
    if ready.output is not None:
        ready.burst.launch()()
        verdict = bout.truth.judge(column.role, ready.output)
    return _Contender(ready, verdict, way.label) if verdict.passed else Cell.wrong(verdict)
