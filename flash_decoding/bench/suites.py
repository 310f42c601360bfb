"""The suites: what was asked for, turned into a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from flash_decoding.bench import attention
from flash_decoding.bench.baselines import attention_columns
from flash_decoding.bench.cases import CPU_BATCH_DIVISOR, Case, announced_cases, parse_rows
from flash_decoding.bench.column import Column
from flash_decoding.bench.environment import describe, device_name
from flash_decoding.bench.extra import require
from flash_decoding.bench.record import Record
from flash_decoding.bench.request import Request, device_of, dtype_of
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.table import render


def run(request: Request, console: Console) -> int:
    """Run a suite, print its table, and save its record and picture.

    Returns:
        The exit status: 1 where a column of our own is wrong or failed, else 0.

    Raises:
        InvalidInput: something that was asked for is unknown, or belongs to another suite.
        Unsupported: a model that cannot be measured.
        MissingDependency: a plot is wanted and matplotlib is not installed, or a model and no Transformers.
    """
    request.check()
    if request.plot:
        require("matplotlib")
    if request.suite == "model":
        require("transformers", extra="transformers")
        from flash_decoding.bench.models import plan

        return plan.run(request, console)
    if request.suite == "serving":
        from flash_decoding.bench.serving import suite

        return suite.run(request, console)
    device = device_of(request)
    return compare(request, _cases(request, device), attention_columns(device), console)


def compare(request: Request, cases: Sequence[Case], columns: Sequence[Column], console: Console) -> int:
    """Measure these rows and columns of the attention suite as :func:`run` says."""
    device = cases[0].device
    record = Record[AttentionRow](
        suite=request.suite,
        title=_title(cases, scaled_down=request.rows is None and device.type == "cpu"),
        environment=describe(device),
        columns=columns,
        effort=attention.effort_of(device, quick=request.quick),
    )
    return attention.conduct(record, cases, columns, request, console, render=render, save_plot=_save_plot)


def _save_plot(record: Record[AttentionRow], path: Path) -> None:
    from flash_decoding.bench.plot import save_plot

    save_plot(record, path)


def _cases(request: Request, device: torch.device) -> list[Case]:
    dtype = dtype_of(request, "bfloat16" if device.type == "cpu" else "float16")
    cases = announced_cases(device, dtype, quick=request.quick)
    return cases if request.rows is None else parse_rows(request.rows, like=cases[0])


def _title(cases: Sequence[Case], *, scaled_down: bool) -> str:
    case = cases[0]
    title = (
        f"Decode attention on {device_name(case.device)}, {case.dtype_name}, {case.heads_q} query heads, "
        f"{case.heads_kv} KV heads, head_dim {case.head_dim}, q_len {case.q_len}"
    )
    if scaled_down:
        title += f"\nscaled down for a CPU: the announcement's lengths, 1/{CPU_BATCH_DIVISOR} of its batch"
    return title
