"""The serving suite: every kind of work on a CPU, a run from end to end, table, picture, host time."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flash_decoding.bench import attention, suites
from flash_decoding.bench.baselines import ours, serving_columns
from flash_decoding.bench.baselines.floor import floor_column
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column
from flash_decoding.bench.inputs import Inputs
from flash_decoding.bench.record import Cell, Record
from flash_decoding.bench.request import Request
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.serving.host import BURST, host_times, per_call, tiny
from flash_decoding.bench.serving.kinds import KINDS, serving_cases
from flash_decoding.bench.serving.plot import points_of, save_plot
from flash_decoding.bench.serving.table import best_peer, render
from flash_decoding.bench.timing import Effort
from flash_decoding.errors import InvalidInput
from flash_decoding.plan import Hardware, make_plan
from tests.test_bench_kinds import on_cpu, on_gpu
from tests.test_bench_record import FINE, timed
from tools.readme_tables import table

CPU = torch.device("cpu")
BRIEF = Effort(budget_s=0.0, min_samples=2, max_samples=2, warmups=1)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_every_column_that_runs_a_kind_on_a_cpu_is_right(name: str) -> None:
    case = on_cpu(name)
    (row,) = attention.run([case], serving_columns(CPU), BRIEF)
    timed_here = {column for column, cell in row.cells.items() if cell.status == "timed"}
    mine = {"ours", "ours, batch invariant", "floor"}
    assert timed_here == (mine if case.page_size else mine | {"eager", "SDPA flash", "SDPA math"})
    assert {cell.status for cell in row.cells.values()} == {"timed", "left out"}
    assert row.checked == case.batch


def suite(tmp_path: Path, **asked: object) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=250)
    request = Request(suite="serving", device="cpu", out=tmp_path, **asked)  # type: ignore[arg-type]  # any field
    status = suites.run(request, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_the_suite_runs_from_end_to_end(tmp_path: Path) -> None:
    status, text = suite(tmp_path, cases="single-512-64-8, ragged-16k-pages16,verify-q2", quick=True)
    assert status == 0
    for words in ("ours / floor", "best peer / floor", "batch invariant / ours", "scaled down for a CPU"):
        assert words in text
    (path,) = tmp_path.glob("serving-*-bfloat16-*.json")
    told = json.loads(path.read_text())
    assert (told["suite"], told["host_us"]) == ("serving", {})
    names = [row["name"] for row in told["rows"]]
    assert names == ["single-512-64-8", "ragged-16k-pages16", "verify-q2"]
    ragged, verify = told["rows"][1:]
    assert (ragged["page_size"], len(ragged["lengths"]), ragged["checked_sequences"]) == (16, 8, 8)
    assert (verify["q_len"], verify["lengths"], verify["window"]) == (2, [], 0)
    assert ragged["cells"]["SDPA math"]["reason"] == "takes no pages, here of 16"
    assert ragged["cells"]["ours, batch invariant"]["times_floor"] > 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_case_that_there_is_not_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cases: got 'gqa-9-3'; wanted mha-32-32 or gqa-32-8"):
        suite(tmp_path, cases="mqa-48-1,gqa-9-3")
    assert list(tmp_path.iterdir()) == []


def test_cases_belong_to_this_suite_and_rows_do_not() -> None:
    with pytest.raises(InvalidInput, match=r"cases: got .*the suite for it is serving"):
        Request(cases="mqa-48-1").check()
    with pytest.raises(InvalidInput, match=r"rows: got .*the suite for it is attention"):
        Request(suite="serving", rows="1x64").check()
    with pytest.raises(InvalidInput, match="cases: got ''"):
        serving_cases(CPU, torch.bfloat16, "")


def example() -> Record[AttentionRow]:
    """Floor 10 us, eager 80, another 20, ours 12, batch invariant 15; over pages the peers have no time."""
    columns = (
        Column.simple("eager", "", nothing),
        Column.simple("other", "", nothing),
        ours.PLANNED,
        ours.INVARIANT,
        floor_column(CPU),
    )
    times = {"eager": 80, "other": 20, "ours": 12, "ours, batch invariant": 15, "floor": 10}
    cells = {name: timed(us * 1e-6) for name, us in times.items()}
    absent = {
        **cells,
        "other": Cell.left_out("takes no pages"),
        "eager": Cell.wrong(FINE),
    }
    rows = [
        AttentionRow(cells, on_gpu("gqa-32-8"), sets=2, checked=16),
        AttentionRow(absent, on_gpu("ragged-16k-pages16"), sets=2, checked=32),
    ]
    extras = {
        "host_us": {"1 x 64": {"decode_attention": 12.34, "another": 8.0}, "1 x 2048": {"another": 9.0}}
    }
    told = {"device": "cuda"}
    return Record("serving", "a title", told, columns, Effort(budget_s=1.0), rows, extras)


def nothing(case: Case, inputs: Inputs) -> Call:
    raise NotImplementedError


def test_the_table_says_who_is_how_far_from_the_floor() -> None:
    console = Console(file=io.StringIO(), width=220)
    record = example()
    console.print(render(record))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    equal, ragged = (next(x for x in lines if f"│ {row.name} " in x) for row in record.rows)
    assert [cell.strip() for cell in equal.split("│")[7:11]] == ["1.20x", "2.00x", "other", "1.25x"]
    assert [cell.strip() for cell in ragged.split("│")[7:11]] == ["1.20x", "-", "-", "1.25x"]
    assert "host, 1 x 64: decode_attention 12.3 us per call, another 8.0 us per call" in lines
    assert "host, 1 x 2048: another 9.0 us per call" in lines
    assert best_peer(record.rows[1], record.shown) is None


def test_the_picture_has_a_dot_for_every_column_and_case(tmp_path: Path) -> None:
    record = example()
    points = points_of(record)
    assert {name: [number for _, number in where] for name, where in points.items()} == {
        "eager": [0],
        "other": [0],
        "ours": [0, 1],
        "ours, batch invariant": [0, 1],
    }
    assert [ratio for ratio, _ in points["ours"]] == pytest.approx([1.2, 1.2])
    save_plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_host_time_is_the_median_per_call_with_an_idle_device() -> None:
    events: list[str] = []
    ticks = itertools.count()

    def call() -> Tensor:
        events.append("call")
        return torch.zeros(())

    told = per_call({"a": call}, lambda: events.append("wait"), lambda: float(next(ticks)), samples=4)
    assert told == {"a": pytest.approx(1e6 / BURST)}
    assert events == [*["wait", *["call"] * BURST] * 6, "wait"]


def test_without_a_gpu_there_is_no_host_time() -> None:
    assert host_times(CPU, torch.bfloat16) == {}


@pytest.mark.parametrize("gpu", ["H200", "A100"])
def test_host_times_are_of_calls_that_launch_once_and_of_calls_that_launch_twice(gpu: str) -> None:
    hardware = Hardware.named(gpu)
    splits = [make_plan(case.problem, hardware).num_splits for case in tiny(CPU, torch.bfloat16)]
    assert splits[0] == 1
    assert splits[-1] > 1


@pytest.mark.gpu
def test_host_times_of_ours_and_of_pytorch() -> None:
    told = host_times(torch.device("cuda"), torch.bfloat16)
    assert list(told) == ["1 x 64", "1 x 128", "1 x 2048"]
    for times in told.values():
        assert list(times) == ["decode_attention", "scaled_dot_product_attention"]
        assert all(us > 0 for us in times.values())


def test_the_readme_shows_multiples_of_the_floor() -> None:
    told = example().to_json()
    assert table(told).splitlines()[2:] == [
        "| gqa-32-8 | 10.0 | **1.20** | 1.50 | 2.00 | other |",
        "| ragged-16k-pages16 | 10.0 | **1.20** | 1.50 | - | - |",
        "",
        "Host, us per eager call, at batch x length 1 x 64: decode_attention 12.3, another 8.0; "
        "1 x 2048: another 9.0.",
    ]


def test_the_readme_leaves_out_host_times_that_are_of_no_case() -> None:
    told = example().to_json() | {"host_us": {"decode_attention": 59.1}}
    assert table(told) == table(example().to_json() | {"host_us": {}})
    assert "Host" not in table(told)
