"""The serving suite: what was asked for, turned into a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from flash_decoding.bench import attention
from flash_decoding.bench.baselines import serving_columns
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Column
from flash_decoding.bench.environment import describe, device_name
from flash_decoding.bench.record import Record
from flash_decoding.bench.request import Request, device_of, dtype_of
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.serving.host import host_times
from flash_decoding.bench.serving.kinds import CPU_BATCH_DIVISOR, CPU_LENGTH_DIVISOR, serving_cases
from flash_decoding.bench.serving.table import render


def run(request: Request, console: Console) -> int:
    """Run the suite, print its table, and save its record and picture.

    Returns:
        The exit status: 1 where a column of our own is wrong or failed, else 0.

    Raises:
        InvalidInput: a case, device or dtype that is unknown.
    """
    device = device_of(request)
    cases = serving_cases(device, dtype_of(request, "bfloat16"), request.cases)
    return compare(request, cases, serving_columns(device), console)


def compare(request: Request, cases: Sequence[Case], columns: Sequence[Column], console: Console) -> int:
    """Measure these rows and columns as :func:`run` says."""
    device = cases[0].device
    record = Record[AttentionRow](
        suite="serving",
        title=_title(device, cases[0].dtype_name),
        environment=describe(device),
        columns=columns,
        effort=attention.effort_of(device, quick=request.quick),
        extras={"host_us": host_times(device, cases[0].dtype)},
    )
    return attention.conduct(record, cases, columns, request, console, render=render, save_plot=_save_plot)


def _save_plot(record: Record[AttentionRow], path: Path) -> None:
    from flash_decoding.bench.serving.plot import save_plot

    save_plot(record, path)


def _title(device: torch.device, dtype: str) -> str:
    title = f"Attention at work in a server, {device_name(device)}, {dtype}"
    if device.type == "cpu":
        title += (
            f"\nscaled down for a CPU: 1/{CPU_BATCH_DIVISOR} of the sequences, "
            f"1/{CPU_LENGTH_DIVISOR} of their lengths and windows"
        )
    return title
