"""Time other versions of the package beside this one: only side by side does a percent mean something.

    python -m tools.compare [--cases NAMES] [--rows ROWS] [--seconds S] [--jobs N] NAME=PLACE...

PLACE is a folder that has a ``flash_decoding`` in it, or a revision of this repository. NAMES are kinds of
work of the serving suite, ROWS are batch x length of the announcement's. A line for each case says what each
version takes, in multiples of the floor, as planned and batch-invariant. Nothing is recorded.

A version is a copy of the package under another name, so that its kernels, plans and operators are its own.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from flash_decoding.bench import attention
from flash_decoding.bench.baselines.floor import floor_column
from flash_decoding.bench.cases import Case, parse_rows
from flash_decoding.bench.column import Column, Way
from flash_decoding.bench.device import failures
from flash_decoding.bench.inputs import make_inputs
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.serving.kinds import serving_cases
from flash_decoding.bench.timing import Effort

PACKAGE = "flash_decoding"
ROOT = Path(__file__).resolve().parents[1]
HERE = "here"


def source_of(place: str, scratch: Path) -> Path:
    """The package's folder in a folder or a revision."""
    folder = Path(place) / PACKAGE
    if folder.is_dir():
        return folder
    command = ["git", "archive", place, PACKAGE]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(scratch, filter="data")
    return scratch / PACKAGE


def copy_as(name: str, source: Path, into: Path) -> None:
    """Copy a package under another name, by which it then imports itself and registers its operators."""
    for path in source.rglob("*.py"):
        target = into / name / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text().replace(PACKAGE, name))


def columns_of(name: str, package: str) -> tuple[Column, Column]:
    """What a version does as planned, and batch-invariant."""
    ours = importlib.import_module(f"{package}.bench.baselines.ours")
    return tuple(  # type: ignore[return-value]  # two of them
        Column(f"{name}{mode}", column.about, "ours", tuple(Way(w.label, w.prepare) for w in column.ways))
        for mode, column in (("", ours.PLANNED), (", invariant", ours.INVARIANT))
    )


def contenders(versions: dict[str, str], scratch: Path, device: torch.device) -> tuple[Column, ...]:
    """This version, the others, and the floor; first of all one that does not count: it warms them up."""
    places = scratch / "packages"
    sys.path.insert(0, str(places))
    columns = [*columns_of("warm-up", PACKAGE)[:1], *columns_of(HERE, PACKAGE)]
    for name, place in versions.items():
        package = f"version_{name}"
        copy_as(package, source_of(place, scratch / name), places)
        columns += columns_of(name, package)
    return (*columns, floor_column(device))


def line_of(row: AttentionRow) -> str:
    """A case in multiples of its floor; why not, where a version failed."""
    floor = row.seconds("floor")
    assert floor is not None, "every case has a floor"
    told = []
    for name, cell in row.cells.items():
        if name not in {"floor", "warm-up"}:
            seconds = row.seconds(name)
            told.append(f"{name} {cell.reason if seconds is None else f'{seconds / floor:.3f}'}")
    return f"{row.name}: floor {floor * 1e6:.2f} us; {'; '.join(told)}"


def make_once(calls: Iterable[tuple[Column, Case]], share: int, shares: int) -> None:
    """Make every ``shares``-th of the calls; who makes it later finds it compiled. Says what fails."""
    for column, case in itertools.islice(calls, share, None, shares):
        inputs = make_inputs(case, seed=0)
        for way in column.ways:
            try:
                way.prepare(case, inputs)()
            except failures(case.device) as error:
                sys.stdout.write(f"{column.name}, {case.name}, {way.label}: {error!r:.200}\n")


def compile_ahead(jobs: int) -> None:
    """Compile side by side, in processes that are given what this one was."""
    command = [sys.executable, "-m", "tools.compare", *sys.argv[1:]]
    running = [subprocess.Popen([*command, "--share", str(job)], cwd=ROOT) for job in range(jobs)]
    for process in running:
        process.wait()


def compare(
    versions: dict[str, str], cases: Sequence[Case], device: torch.device, seconds: float
) -> Iterator[str]:
    """A line for each case."""
    with tempfile.TemporaryDirectory() as scratch:
        columns = contenders(versions, Path(scratch), device)
        effort = Effort(budget_s=seconds, min_samples=3 if device.type == "cpu" else 20)
        for row in attention.run(cases, columns, effort):
            yield line_of(row)


def main() -> None:
    """Compare what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", help="kinds of work, with commas between; all, if there are no rows either"
    )
    parser.add_argument("--rows", help="rows such as 1x65536,16x4096")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each version and case")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile before anything is timed")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("versions", nargs="+", metavar="NAME=PLACE")
    given = parser.parse_args()
    versions = dict(text.split("=", 1) for text in given.versions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    like = Case(batch=1, kv_len=1, dtype=torch.float16, device=device)
    cases = parse_rows(given.rows, like) if given.rows else []
    if given.cases or not cases:
        cases += serving_cases(device, torch.bfloat16, given.cases)
    if given.share is not None:
        with tempfile.TemporaryDirectory() as scratch:
            columns = contenders(versions, Path(scratch), device)
            make_once(itertools.product(columns, cases), given.share, given.jobs)
        return
    if given.jobs:
        compile_ahead(given.jobs)
    for line in compare(versions, cases, device, given.seconds):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
