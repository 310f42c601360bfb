"""The suites: how a run goes from what was asked for to table, record and picture."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flash_decoding.bench import attention
from flash_decoding.bench.baselines import attention_columns
from flash_decoding.bench.cases import CPU_BATCH_DIVISOR, Case, announced_cases, parse_rows
from flash_decoding.bench.column import Column
from flash_decoding.bench.environment import describe, device_name
from flash_decoding.bench.extra import require
from flash_decoding.bench.record import Record
from flash_decoding.bench.table import render
from flash_decoding.bench.timing import Effort
from flash_decoding.errors import InvalidInput

SUITES = ("attention",)
"""What ``--suite`` takes. Whole models and a serving mix are to be the next two."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    suite: str = "attention"
    device: str | None = None
    """None: the GPU where there is one."""
    dtype: str | None = None
    """None: float16 on a GPU as in the announcement, bfloat16 on a CPU."""
    rows: str | None = None
    """Such as ``256x256,1x65536``; None: the announcement's."""
    quick: bool = False
    """Three rows, and less time for each."""
    out: Path = Path("results")
    plot: bool = True


def run(request: Request, console: Console) -> int:
    """Run a suite, print its table, and save its record and picture.

    Returns:
        The exit status: 1 where a column of our own is wrong or failed, else 0.

    Raises:
        InvalidInput: the suite, device, dtype or rows are unknown.
        MissingDependency: a plot is wanted and matplotlib is not installed.
    """
    if request.suite not in SUITES:
        raise InvalidInput("suite", repr(request.suite), " or ".join(SUITES))
    if request.plot:
        require("matplotlib")
    device = _device(request.device)
    return compare(request, _cases(request, device), attention_columns(device), console)


def compare(request: Request, cases: Sequence[Case], columns: Sequence[Column], console: Console) -> int:
    """Measure these rows and columns, and show and save the result as :func:`run` says."""
    device = cases[0].device
    record = Record(
        suite=request.suite,
        title=_title(cases, scaled_down=request.rows is None and device.type == "cpu"),
        environment=describe(device),
        columns=columns,
        effort=_effort(device, quick=request.quick),
    )
    path = request.out / _file_name(request.suite, cases[0])
    console.print(record.title, style="bold", soft_wrap=True)
    _fill(record, cases, path, console)
    console.print(render(record))
    console.print(f"record: {path}", soft_wrap=True)
    if request.plot:
        from flash_decoding.bench.plot import save_plot

        save_plot(record, path.with_suffix(".png"))
        console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
    for complaint in record.complaints:
        console.print(f"defect: {complaint}", style="bold red", soft_wrap=True)
    return 1 if record.complaints else 0


def _fill(record: Record, cases: Sequence[Case], path: Path, console: Console) -> None:
    """Measure row by row, with a progress bar on a terminal; the file is whole after each row."""
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * (len(record.columns) + 1))

        def step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        for row in attention.run(cases, record.columns, record.effort, step):
            record.rows.append(row)
            record.save(path)


def _device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    spelt = re.fullmatch(r"cuda(?::(\d+))?", name)
    if spelt is None or int(spelt[1] or 0) >= count:
        raise InvalidInput("device", repr(name), f"cpu, cuda or cuda:N; PyTorch sees {count} GPUs here")
    if spelt[1] is not None:
        torch.cuda.set_device(int(spelt[1]))
    return torch.device(name)


def _cases(request: Request, device: torch.device) -> list[Case]:
    name = request.dtype or ("bfloat16" if device.type == "cpu" else "float16")
    if name not in DTYPES:
        raise InvalidInput("dtype", repr(name), " or ".join(DTYPES))
    cases = announced_cases(device, DTYPES[name], quick=request.quick)
    return cases if request.rows is None else parse_rows(request.rows, like=cases[0])


def _effort(device: torch.device, *, quick: bool) -> Effort:
    """So that ten rows of all columns take about two minutes on two CPU cores, and less on a GPU."""
    budget_s, fewest = (0.7, 3) if device.type == "cpu" else (0.15, 20)
    return Effort(budget_s=budget_s / 4 if quick else budget_s, min_samples=fewest)


def _title(cases: Sequence[Case], *, scaled_down: bool) -> str:
    case = cases[0]
    title = (
        f"Decode attention on {device_name(case.device)}, {_dtype_name(case)}, {case.heads_q} query heads, "
        f"{case.heads_kv} KV heads, head_dim {case.head_dim}, q_len {case.q_len}"
    )
    if scaled_down:
        title += f"\nscaled down for a CPU: the announcement's lengths, 1/{CPU_BATCH_DIVISOR} of its batch"
    return title


def _dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _file_name(suite: str, case: Case) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", device_name(case.device).lower()).strip("-")
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return f"{suite}-{name}-{_dtype_name(case)}-{stamp}.json"
