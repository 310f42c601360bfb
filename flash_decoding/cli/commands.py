"""The commands, thin: arguments in, a call of the library, text out. ``generate`` has a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from flash_decoding.bench import suites
from flash_decoding.bench.cases import Case
from flash_decoding.bench.environment import describe
from flash_decoding.bench.request import DTYPES, SUITES, Request
from flash_decoding.cli.generate import generate
from flash_decoding.plan.explain import explain as explain_call
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.variants import VARIANTS

WIDE = 200
"""Columns of a table that goes into a file or a pipe, where no terminal sets a limit."""

app = typer.Typer(
    help="Flash-Decoding: write text with it, measure it, ask what it would do, see what it found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate)


@app.command()
def bench(
    *,
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(SUITES)}.")] = "attention",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)}.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the record and the plot.")] = Path("results"),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Record only.")] = False,
    rows: Annotated[str | None, typer.Option(help="attention: batch x length, such as 1x65536.")] = None,
    cases: Annotated[str | None, typer.Option(help="serving: such as gqa-32-8,verify-q4; all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three rows of attention, or a small model; less time.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="model: such as CodeLlama-34B, a folder, or an id of the hub.")
    ] = None,
    contexts: Annotated[str | None, typer.Option(help="model: such as 512,65536.")] = None,
    compiled_contexts: Annotated[
        str | None, typer.Option(help="model: those for which torch.compile is measured; all if left out.")
    ] = None,
    batch: Annotated[str | None, typer.Option(help="model: batch sizes, such as 1,16.")] = None,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="model: lengths from an eighth of the context to all of it.")
    ] = False,
    columns: Annotated[str | None, typer.Option(help="model: such as 'eager,ours,bound'; all.")] = None,
    steps: Annotated[int | None, typer.Option(help="model: most steps per column and context.")] = None,
) -> None:
    """Measure attention, a server's work, or whole models, against other libraries and the memory.

    Every column is checked against a reference before it is timed. Exit status 1: one of ours is wrong.
    """
    request = Request(
        suite=suite,
        device=device,
        dtype=dtype,
        out=out,
        plot=not no_plot,
        rows=rows,
        cases=cases,
        quick=quick,
        model=model,
        contexts=contexts,
        compiled_contexts=compiled_contexts,
        batch=batch,
        ragged=ragged,
        columns=columns,
        steps=steps,
    )
    raise typer.Exit(suites.run(request, _console()))


@app.command()
def explain(
    *,
    batch: Annotated[int, typer.Option(help="Sequences.")],
    heads_q: Annotated[int, typer.Option(help="Query heads.")],
    heads_kv: Annotated[int, typer.Option(help="Key/value heads.")],
    head_dim: Annotated[int, typer.Option(help="Elements of a query or key.")],
    kv_len: Annotated[int, typer.Option(help="Keys per sequence.")],
    q_len: Annotated[int, typer.Option(help="Query tokens per sequence.")] = 1,
    head_dim_v: Annotated[int | None, typer.Option(help="Elements of a value; head_dim if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="Of queries and cache.")] = "bfloat16",
    page_size: Annotated[int, typer.Option(help="Tokens per page; 0 for a contiguous cache.")] = 0,
    window_size: Annotated[tuple[int, int], typer.Option(help="Left and right; -1 is unbounded.")] = (-1, -1),
    causal: Annotated[bool, typer.Option(help="Hide later tokens from earlier ones.")] = True,
    num_splits: Annotated[int, typer.Option(help="0: the planner's choice.")] = 0,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="Fixed keys per split.")] = False,
    gpu: Annotated[str | None, typer.Option(help="Such as H200; this machine's device if left out.")] = None,
) -> None:
    """Say which kernel a call would run, with how many splits, why, and what the memory allows."""
    explanation = explain_call(
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        kv_len=kv_len,
        q_len=q_len,
        head_dim_v=head_dim_v,
        dtype=dtype,
        page_size=page_size,
        window_size=window_size,
        causal=causal,
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        gpu=gpu,
    )
    typer.echo(str(explanation))


@app.command()
def info() -> None:
    """Show versions, the device, and which variants run plain decoding on it (and why the others do not)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in describe(device).items():
        typer.echo(f"{name:<15}{value}")
    problem = Case(batch=1, kv_len=65536, dtype=torch.float16, device=device).problem
    hardware = Hardware.of(device)
    for variant in VARIANTS:
        reasons = variant.why_not(problem, hardware)
        verdict = f"no: {'; '.join(reasons)}" if reasons else "yes"
        typer.echo(f"{'variant ' + variant.name:<15}{variant.what}: {verdict}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)
