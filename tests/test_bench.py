"""The bench: its rows, its gate, and what becomes of columns that are wrong, broken or absent."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from flash_decoding.bench import attention, suites
from flash_decoding.bench.baselines import attention_columns, peers, pytorch
from flash_decoding.bench.baselines.floor import floor_column
from flash_decoding.bench.cases import (
    ANNOUNCED,
    MAX_SETS,
    Case,
    announced_cases,
    parse_rows,
    set_count,
)
from flash_decoding.bench.check import Truth
from flash_decoding.bench.column import Call, Column, Way
from flash_decoding.bench.inputs import Inputs, make_inputs
from flash_decoding.bench.request import Request
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.timing import Effort
from flash_decoding.errors import InvalidInput

CPU = torch.device("cpu")
TINY = Case(batch=2, kv_len=64, dtype=torch.bfloat16, device=CPU, heads_q=4, heads_kv=2, head_dim=32)
BRIEF = Effort(budget_s=0.0, min_samples=2, max_samples=2, warmups=1)
MIB = 1 << 20


def wrongly(change: Callable[[Tensor], Tensor]) -> Callable[[Case, Inputs], Call]:
    """Eager attention with its result spoilt."""

    def prepare(case: Case, inputs: Inputs) -> Call:
        right = pytorch.EAGER.ways[0].prepare(case, inputs)
        return lambda: change(right())

    return prepare


def raising(error: Exception) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        raise error

    return prepare


def measured(*columns: Column, case: Case = TINY) -> AttentionRow:
    (row,) = attention.run([case], columns, BRIEF)
    return row


def test_the_rows_are_the_announcements() -> None:
    gpu = announced_cases(torch.device("cuda"), torch.float16)
    assert [(case.batch, case.kv_len) for case in gpu] == list(ANNOUNCED)
    assert len(gpu) == 10
    assert {(c.heads_q, c.heads_kv, c.head_dim, c.q_len) for c in gpu} == {(16, 2, 128, 1)}
    assert [case.kv_bytes // MIB for case in gpu] == [64] * 9 + [128]


def test_a_cpu_takes_an_eighth_of_the_batch_and_every_length() -> None:
    small = announced_cases(CPU, torch.bfloat16)
    assert [case.kv_len for case in small] == [kv_len for _, kv_len in ANNOUNCED]
    assert [case.batch for case in small] == [32, 16, 8, 4, 2, 1, 1, 1, 1, 1]


def test_rows_can_be_given() -> None:
    assert [case.name for case in parse_rows("2x128, 1x65536", like=TINY)] == ["2 x 128", "1 x 65536"]


@pytest.mark.parametrize("text", ["", "128", "0x128", "1x", "1x-5", "1x2x3", "axb"])
def test_rows_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="rows: got"):
        parse_rows(text, like=TINY)


def test_sets_overflow_the_cache_fourfold() -> None:
    row = announced_cases(torch.device("cuda"), torch.float16)[0]
    assert set_count(row, 60 * MIB) == 4
    assert set_count(row, MIB) == 2
    assert set_count(TINY, 60 * MIB) == MAX_SETS


def test_losing_any_key_of_a_long_sequence_fails_the_check() -> None:
    """The first, the last, or one tile in the middle: each is farther off than rounding explains."""
    case = replace(TINY, batch=1, kv_len=4096)
    inputs = make_inputs(case, seed=0)
    truth = Truth.of(case, inputs)
    for lost in (slice(0, 1), slice(4095, 4096), slice(2048, 2112)):
        keep = torch.ones(case.kv_len, dtype=torch.bool)
        keep[lost] = False
        fewer = Inputs(inputs.q, inputs.k[:, keep], inputs.v[:, keep], inputs.cache_seqlens)
        shorter = replace(case, kv_len=int(keep.sum()))
        assert not truth.judge("peer", pytorch.EAGER.ways[0].prepare(shorter, fewer)()).passed
    assert truth.judge("peer", pytorch.EAGER.ways[0].prepare(case, inputs)()).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_budget_is_small_beside_the_result(dtype: torch.dtype) -> None:
    case = replace(TINY, dtype=dtype)
    truth = Truth.of(case, make_inputs(case, seed=0))
    assert 0 < truth.budget < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda out: out * 1.1, "error"),
        (lambda out: out.flip(0), "error"),
        (lambda out: out.float(), "returned torch.float32"),
        (lambda out: out[:1], r"returned torch.bfloat16 \(1, 1, 4, 32\)"),
        (lambda out: out.index_fill(0, torch.tensor(1), math.nan), "NaN"),
    ],
)
def test_a_wrong_column_is_caught_and_not_timed(change: Callable[[Tensor], Tensor], complaint: str) -> None:
    column = Column.simple("odd", "", wrongly(change))
    cell = measured(column, floor_column(CPU)).cells["odd"]
    assert cell.status == "wrong"
    assert re.search(complaint, cell.reason)
    assert cell.timing is None


def test_a_column_that_raises_costs_no_other_column() -> None:
    broken = Column.simple("broken", "", raising(ValueError("no such\n   kernel")))
    row = measured(broken, pytorch.EAGER, floor_column(CPU))
    assert row.cells["broken"].status == "failed"
    assert row.cells["broken"].reason == "ValueError: no such kernel"
    assert row.cells["eager"].timing is not None
    assert row.cells["floor"].timing is not None


def test_a_mistake_of_the_bench_itself_is_not_hidden() -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(Column("mine", "", "peer", (Way("mine", interrupted),)))


def interrupted(case: Case, inputs: Inputs) -> Call:
    raise KeyboardInterrupt


def test_a_column_says_where_it_does_not_run() -> None:
    row = measured(pytorch.UNSPLIT, peers.PEERS[0], floor_column(CPU))
    assert row.cells["FA2, no split"].reason == "CUDA only"
    assert {cell.status for name, cell in row.cells.items() if name != "floor"} == {"left out"}


def test_the_fastest_way_that_is_right_counts() -> None:
    eager = pytorch.EAGER.ways[0].prepare
    slow = Way("slow", wrongly(lambda out: [torch.ones(512, 512) @ torch.ones(512, 512), out][1]))
    ways = (Way("wrong", wrongly(lambda out: out + 1)), slow, Way("fast", eager))
    cell = measured(Column("several", "", "peer", ways), floor_column(CPU)).cells["several"]
    assert (cell.status, cell.way) == ("timed", "fast")


def test_every_column_that_runs_on_a_cpu_is_right() -> None:
    row = measured(*attention_columns(CPU))
    timed = {name for name, cell in row.cells.items() if cell.status == "timed"}
    assert timed == {"eager", "SDPA flash", "SDPA math", "ours, no split", "ours", "floor"}
    assert {cell.status for cell in row.cells.values()} == {"timed", "left out"}


def run_suite(tmp_path: Path, *columns: Column) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    status = suites.compare(Request(out=tmp_path, quick=True, plot=False), [TINY], columns, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_one_of_ours_being_wrong_is_an_error(tmp_path: Path) -> None:
    wrong = Column.simple("ours", "", wrongly(lambda out: out + 1), role="ours")
    status, text = run_suite(tmp_path, pytorch.EAGER, wrong, floor_column(CPU))
    assert status == 1
    assert "WRONG" in text
    assert "defect: 2 x 64, ours: wrong" in text


def test_a_peer_being_wrong_is_shown_and_is_no_error(tmp_path: Path) -> None:
    wrong = Column.simple("peer", "a peer", wrongly(lambda out: out + 1))
    status, text = run_suite(tmp_path, pytorch.EAGER, wrong, floor_column(CPU))
    assert status == 0
    assert "WRONG" in text
    assert "wrong: error" in text
