"""The model suite: each column is checked on a slice of the model, then timed on all of it, one at a time."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flash_decoding.bench.baselines.transformers_models import eager
from flash_decoding.bench.check import Verdict
from flash_decoding.bench.conduct import Step
from flash_decoding.bench.device import failures, release_memory
from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.models.check import Truth, checked_cases, worse
from flash_decoding.bench.models.column import ModelColumn
from flash_decoding.bench.models.reads import weight_bytes
from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.models.source import Source
from flash_decoding.bench.models.stepping import StepBurst
from flash_decoding.bench.record import Cell
from flash_decoding.bench.timing import Effort, Timing, measure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelSuite:
    """What is measured, and how."""

    source: Source
    cases: Sequence[ModelCase]
    columns: Sequence[ModelColumn]
    compiled_contexts: frozenset[int]
    """Contexts for which columns that compile are measured."""
    bandwidth: float
    """Bytes per second of the bound."""
    effort: Effort

    @property
    def steps(self) -> int:
        """How often :meth:`rows` tells what it is about to do."""
        return len(self.columns) * (len(self._batches) + len(self.cases)) + 1

    @property
    def _batches(self) -> list[int]:
        return list(dict.fromkeys(case.batch for case in self.cases))

    def rows(self, step: Step) -> Iterator[ModelRow]:
        """Measure the rows one by one; each is complete when it comes.

        A column that does not run, raises, needs more memory than there is, or gives wrong logits gets a cell
        that says so, and the others are measured all the same.
        """
        gates = {batch: self._gate(batch, step) for batch in self._batches}
        step(f"loading {self.source.name}")
        case = self.cases[0]
        _release(case.device)
        model = self.source.load(case.dtype, case.device)
        for case in self.cases:
            yield self._row(model, case, gates[case.batch], step)

    def _gate(self, batch: int, step: Step) -> dict[str, Verdict | Cell]:
        """What became of each column on the slice, where it runs at all.

        From the last to the first: a column that changes the model for good shows in those before it, which
        follow it in the timing as soon as there is a second context.
        """
        cases = [case for case in self.cases if case.batch == batch]
        model = self.source.slice(cases[0].dtype, cases[0].device)
        like = cases[0].with_layers(model.config.num_hidden_layers)
        truths = [Truth.of(model, case, eager) for case in checked_cases(like)]
        results: dict[str, Verdict | Cell] = {}
        for column in reversed(self.columns):
            step(f"batch {like.batch}: checking {column.name}")
            if any(self._why_not(column, case) is None for case in cases):
                results[column.name] = _judge(column, truths)
                _release(like.device)
        return results

    def _why_not(self, column: ModelColumn, case: ModelCase) -> str | None:
        """Reason why nothing of the column runs, or None."""
        if column.prepare is None:
            return "computed"
        if column.compiles and case.context not in self.compiled_contexts:
            return f"context {case.context} is not among those to compile for"
        return column.why_not(case)

    def _row(
        self, model: PreTrainedModel, case: ModelCase, gate: Mapping[str, Verdict | Cell], step: Step
    ) -> ModelRow:
        weights = weight_bytes(model, case.batch)
        cells, peaks = {}, {}
        for column in self.columns:
            step(f"{case.name}: {column.name}")
            cells[column.name] = self._cell(model, case, column, gate)
            if column.name in gate:
                _release(case.device)
            if cells[column.name].timing is not None and _counts(case):
                peaks[column.name] = torch.cuda.max_memory_allocated(case.device)
        whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        bound = Cell.computed((weights + case.kv_bytes) / self.bandwidth)
        cells |= {column.name: bound for column in self.columns if column.role == "floor"}
        return ModelRow(cells, case, weights, whole, peaks)

    def _cell(
        self,
        model: PreTrainedModel,
        case: ModelCase,
        column: ModelColumn,
        gate: Mapping[str, Verdict | Cell],
    ) -> Cell:
        reason = self._why_not(column, case)
        if reason is not None:
            return Cell.left_out(reason)
        checked = gate[column.name]
        if isinstance(checked, Cell):
            return checked
        if not checked.passed:
            return Cell.wrong(checked)
        try:
            return Cell.timed(self._timed(model, case, column), checked)
        except torch.OutOfMemoryError as error:
            return Cell.failed(f"out of memory: {error}")
        except failures(case.device) as error:
            return Cell.failed(f"{type(error).__name__}: {error}")

    @torch.no_grad()
    def _timed(self, model: PreTrainedModel, case: ModelCase, column: ModelColumn) -> Timing:
        assert column.prepare is not None, "a bound is computed"
        if _counts(case):
            torch.cuda.reset_peak_memory_stats(case.device)
        stepper = column.prepare(model, case)
        try:
            return measure({column.name: StepBurst(stepper, case)}, self.effort)[column.name]
        finally:
            stepper.close()


def effort_of(device: torch.device, burst: int, steps: int | None, *, quick: bool) -> Effort:
    """As many steps as asked for, fewer where they are slow: some seconds for each column and context."""
    budget_s, usual = (3.0, 128) if device.type == "cuda" else (1.0, 15)
    budget_s = budget_s / 2 if quick else budget_s
    bursts = math.ceil((steps or usual) / burst)
    return Effort(budget_s=budget_s, min_samples=min(3, bursts), max_samples=bursts, warmups=2)


def _judge(column: ModelColumn, truths: Sequence[Truth]) -> Verdict | Cell:
    """The worst verdict on a column, or the cell that says what it raised."""
    try:
        verdicts = [truth.judge(column) for truth in truths]
    except failures(truths[0].case.device) as error:
        return Cell.failed(f"{type(error).__name__}: {error}")
    return functools.reduce(worse, verdicts)


def _counts(case: ModelCase) -> bool:
    """Only on a GPU does PyTorch count what it allocates."""
    return case.device.type == "cuda"


def _release(device: torch.device) -> None:
    """Columns hold models and caches in cycles; the next one is to find all of the memory."""
    gc.collect()
    release_memory(device)
