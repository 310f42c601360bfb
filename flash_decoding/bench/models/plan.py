"""What was asked for, turned into a run of the model suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from flash_decoding.bench.baselines.model_columns import model_columns
from flash_decoding.bench.conduct import Run, file_name
from flash_decoding.bench.environment import describe, device_name
from flash_decoding.bench.models.bandwidth import copy_bandwidth
from flash_decoding.bench.models.case import ModelCase, lengths_of
from flash_decoding.bench.models.column import ModelColumn
from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.models.source import Source
from flash_decoding.bench.models.suite import ModelSuite, effort_of
from flash_decoding.bench.models.table import render
from flash_decoding.bench.record import Record
from flash_decoding.bench.request import Request, device_of, dtype_of
from flash_decoding.errors import InvalidInput

CPU_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
CONTEXTS = {"cpu": CPU_CONTEXTS, "cuda": (512, 2048, 4096, 8192, 16384, 32768, 65536, 131072)}
QUICK_CONTEXTS = {"cpu": CPU_CONTEXTS, "cuda": (512, 4096, 16384, 65536)}
MODELS = {"cpu": "tiny-llama-cpu", "cuda": "Llama-3.1-8B"}
QUICK_MODELS = {"cpu": "tiny-llama-cpu", "cuda": "Qwen3-0.6B"}
BURSTS = {"cpu": 1, "cuda": 8}
"""Steps in a row: on a GPU the first ones must not wait for the host."""


def run(request: Request, console: Console) -> int:
    """Run the suite, print its table, and save its record and picture.

    Returns:
        The exit status: 1 where a column of our own is wrong or failed, else 0.

    Raises:
        InvalidInput: something that was asked for is unknown or out of range.
        Unsupported: a model that cannot be measured.
    """
    device = device_of(request)
    dtype = dtype_of(request, "bfloat16")
    source = Source.find(request.model or (QUICK_MODELS if request.quick else MODELS)[device.type])
    cases = cases_of(request, source, dtype, device)
    columns = chosen_columns(request.columns, model_columns(device))
    contexts = () if request.quick else tuple(case.context for case in cases)
    compiled = numbers("compiled-contexts", request.compiled_contexts, contexts)
    suite = ModelSuite(
        source=source,
        cases=cases,
        columns=columns,
        compiled_contexts=frozenset(compiled),
        bandwidth=copy_bandwidth(device),
        effort=effort_of(device, BURSTS[device.type], request.steps, quick=request.quick),
    )
    return conduct(request, suite, console)


def conduct(request: Request, suite: ModelSuite, console: Console) -> int:
    """Measure this suite, and show and save the result as :func:`run` says."""
    case = suite.cases[0]
    record = Record[ModelRow](
        suite=request.suite,
        title=_title(suite),
        environment={**describe(case.device), "copy_gb_per_s": suite.bandwidth / 1e9},
        columns=suite.columns,
        effort=suite.effort,
    )
    ready = Run(
        record=record,
        measure=suite.rows,
        steps=suite.steps,
        render=render,
        save_plot=_save_plot if request.plot else None,
    )
    dtype = str(case.dtype).removeprefix("torch.")
    return ready.conduct(request.out / file_name(case.device, "model", suite.source.name, dtype), console)


def cases_of(request: Request, source: Source, dtype: torch.dtype, device: torch.device) -> list[ModelCase]:
    """The rows: every context for every batch size.

    Raises:
        InvalidInput: sizes that are no positive integers, or contexts too short to be measured.
    """
    usual = QUICK_CONTEXTS if request.quick else CONTEXTS
    contexts = numbers("contexts", request.contexts, usual[device.type])
    burst = BURSTS[device.type]
    if request.steps is not None and request.steps < 1:
        raise InvalidInput("steps", request.steps, "1 or more")
    cases = []
    for batch in numbers("batch", request.batch, (1,)):
        for context in contexts:
            lengths = lengths_of(batch, context, ragged=request.ragged)
            if min(lengths) <= burst:
                raise InvalidInput("contexts", context, f"sequences of more than {burst} tokens")
            case = ModelCase(
                context=context,
                lengths=lengths,
                burst=burst,
                layers=source.layers,
                heads_kv=source.heads_kv,
                head_dim=source.head_dim,
                dtype=dtype,
                device=device,
            )
            cases.append(case)
    return cases


def numbers(argument: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Positive integers with commas between, in the order given.

    Raises:
        InvalidInput: one is none.
    """
    if text is None:
        return tuple(default)
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InvalidInput(argument, repr(text), "positive integers with commas between, such as 512,65536")
    return tuple(dict.fromkeys(int(word) for word in words))


def chosen_columns(text: str | None, columns: Sequence[ModelColumn]) -> list[ModelColumn]:
    """The columns named, in the order of the table, and the bound in any case.

    Raises:
        InvalidInput: no column has such a name.
    """
    if text is None:
        return list(columns)
    known = [column.name for column in columns]
    wanted = {word.strip() for word in text.split(",")}
    if not wanted <= set(known):
        raise InvalidInput("columns", repr(text), f"names with commas between, out of: {', '.join(known)}")
    return [column for column in columns if column.name in wanted or column.role == "floor"]


def _title(suite: ModelSuite) -> str:
    case = suite.cases[0]
    weights = "its checkpoint" if suite.source.checkpoint else "random weights"
    ragged = ", lengths from an eighth of the context to all of it" if case.is_ragged else ""
    dtype = str(case.dtype).removeprefix("torch.")
    return (
        f"Greedy decoding of {suite.source.name} on {device_name(case.device)}, {dtype}, {weights}, "
        f"batch {', '.join(map(str, dict.fromkeys(c.batch for c in suite.cases)))}{ragged}"
    )


def _save_plot(record: Record[ModelRow], path: Path) -> None:
    from flash_decoding.bench.models.plot import save_plot

    save_plot(record, path)
