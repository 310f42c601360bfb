"""What a run leaves behind: the record's layout, the table's cells, the picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from flash_decoding.bench import environment
from flash_decoding.bench.baselines import pytorch
from flash_decoding.bench.baselines.floor import floor_column
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Verdict
from flash_decoding.bench.column import Column
from flash_decoding.bench.device import USUAL_CPU_CACHE, _cpu_cache_bytes
from flash_decoding.bench.drawing import spread
from flash_decoding.bench.plot import lines_of, save_plot
from flash_decoding.bench.record import Cell, Record
from flash_decoding.bench.row import AttentionRow
from flash_decoding.bench.table import MICROSECONDS, render
from flash_decoding.bench.timing import Effort, Timing

CPU = torch.device("cpu")
OURS = Column.simple("ours", "all of it", pytorch.EAGER.ways[0].prepare, role="ours")
COLUMNS = (pytorch.EAGER, pytorch.UNSPLIT, OURS, floor_column(CPU))
FINE = Verdict(1e-5, 1e-4)


def timed(seconds: float, note: str = "") -> Cell:
    return Cell.timed(Timing(seconds, seconds * 0.9, seconds * 1.2, 50, 8), FINE, way="a way", note=note)


def example(*, ours: Cell | None = None, device: str = "cuda") -> Record[AttentionRow]:
    """Two rows of made-up numbers: 1 ms eager, 30 us ours, 20 us the floor at 64 MiB."""
    rows = []
    for batch, kv_len in ((256, 256), (1, 65536)):
        case = Case(batch=batch, kv_len=kv_len, dtype=torch.float16, device=CPU)
        cells = {
            "eager": timed(1e-3),
            "FA2, no split": Cell.left_out("CUDA only"),
            "ours": ours or timed(30e-6, note="not in a CUDA graph"),
            "floor": timed(20e-6),
        }
        rows.append(AttentionRow(cells, case, sets=4, checked=batch))
    told = {"device": device, "commit": "0" * 40}
    return Record("attention", "a title", told, COLUMNS, Effort(budget_s=1.0), rows)


def shown(record: Record[AttentionRow]) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(record))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_record_says_everything_in_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"
    example().save(path)
    told = json.loads(path.read_text())
    assert list(told) == ["schema", "suite", "title", "environment", "effort", "columns", "rows"]
    assert told["columns"][2] == {"name": "ours", "about": "all of it", "role": "ours"}
    row = told["rows"][1]
    assert (row["batch"], row["kv_len"], row["dtype"]) == (1, 65536, "float16")
    assert (row["bytes"], row["rotated_bytes"]) == (64 << 20, 256 << 20)
    ours = row["cells"]["ours"]
    assert ours["median_us"] == pytest.approx(30)
    assert (ours["p10_us"], ours["p90_us"]) == (pytest.approx(27), pytest.approx(36))
    assert ours["gb_per_s"] == pytest.approx((64 << 20) / 30e-6 / 1e9)
    assert ours["times_floor"] == pytest.approx(1.5)
    assert (ours["error"], ours["allowed_error"]) == (1e-5, 1e-4)
    assert row["cells"]["FA2, no split"] == {"status": "left out", "reason": "CUDA only"}
    assert list(tmp_path.rglob("*.tmp")) == []


def test_an_infinite_error_still_makes_valid_json(tmp_path: Path) -> None:
    record = example(ours=Cell.wrong(Verdict(float("inf"), 1e-4, "returned NaN or infinity")))
    record.save(tmp_path / "record.json")
    cell = json.loads((tmp_path / "record.json").read_text())["rows"][0]["cells"]["ours"]
    assert (cell["status"], cell["error"], cell["reason"]) == ("wrong", None, "returned NaN or infinity")


def test_the_environment_says_where_and_with_what() -> None:
    told = environment.describe(CPU)
    wanted = {"date", "command", "commit", "dirty", "source_sha256", "device", "device_name", "driver"}
    assert wanted | {"cpu", "cpu_threads", "python", "libraries"} <= set(told)
    assert told["libraries"]["torch"] == torch.__version__
    assert told["date"].endswith("+00:00")
    assert json.loads(json.dumps(told)) == told


def test_a_command_names_no_folder_of_this_machine() -> None:
    command = "python -m flash_decoding bench --out /some/where/out --rows 1x64 results/a.json"
    assert environment.without_folders(command) == (
        "python -m flash_decoding bench --out out --rows 1x64 results/a.json"
    )


def test_a_failure_names_no_folder_of_this_machine() -> None:
    cell = Cell.failed("RuntimeError: no room\n at /some/where/peer/allocator.h:49")
    assert cell.reason == "RuntimeError: no room at allocator.h:49"


def test_source_that_no_repository_holds_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(environment, "PACKAGE", tmp_path)
    before = environment.source()
    (tmp_path / "module.py").write_text("x = 2\n")
    assert (before["commit"], before["dirty"]) == (None, None)
    assert environment.source()["source_sha256"] != before["source_sha256"]


def test_the_cpu_cache_is_the_largest_that_the_system_names(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32768K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert _cpu_cache_bytes(tmp_path) == 32 << 20
    assert _cpu_cache_bytes(tmp_path / "nothing") == USUAL_CPU_CACHE


def test_the_table_shows_times_ratios_and_reasons() -> None:
    text = shown(example())
    assert "median us per call" in text
    assert "30.0*" in text
    assert "1.50x" in text
    assert "left out: CUDA only" in text
    assert "* not in a CUDA graph" in text


def test_a_cpus_table_is_in_milliseconds() -> None:
    text = shown(example(device="cpu"))
    assert "median ms per call" in text
    assert "0.02" in text


def test_a_wrong_cell_is_written_out() -> None:
    record = example(ours=Cell.wrong(FINE))
    assert "WRONG" in shown(record)
    assert len(record.complaints) == 2


@pytest.mark.parametrize(("seconds", "text"), [(1.234e-6, "1.23"), (23.45e-6, "23.4"), (1823.2e-6, "1823")])
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert MICROSECONDS.text(seconds) == text


def test_the_plot_draws_every_timed_column(tmp_path: Path) -> None:
    record = example()
    assert [line.name for line in lines_of(record)] == ["eager", "ours", "floor"]
    save_plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    placed = spread([0.5, 0.5, 0.51, 0.9], gap=0.1)
    assert placed[3] == 0.9
    assert [b - a for a, b in zip(sorted(placed[:3]), sorted(placed[:3])[1:], strict=False)] == [
        pytest.approx(0.1)
    ] * 2
    assert placed[2] == max(placed[:3])
    assert sum(placed[:3]) == pytest.approx(1.51)
    assert spread([0.0, 0.01], gap=0.1) == [0.0, 0.1]
