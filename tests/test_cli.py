"""The command line: every command on something tiny, and one line where something is missing or wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flash_decoding.cli import main
from flash_decoding.cli.commands import app
from tests.source_tree import ROOT

SIZES = ["--batch=1", "--heads-q=16", "--heads-kv=2", "--head-dim=128", "--kv-len=65536"]


def test_bench_prints_a_table_and_leaves_a_record_and_a_plot(tmp_path: Path) -> None:
    command = ["bench", "--device", "cpu", "--rows", "2x64", "--quick", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "ours / floor" in result.output
    (record,) = tmp_path.glob("attention-*.json")
    rows = json.loads(record.read_text())["rows"]
    assert [(row["batch"], row["kv_len"]) for row in rows] == [(2, 64)]
    assert rows[0]["cells"]["ours"]["status"] == "timed"
    assert record.with_suffix(".png").exists()
    assert record.name in result.output.replace("\n", "")


def test_explain_says_what_would_run_on_any_gpu() -> None:
    result = CliRunner().invoke(app, ["explain", *SIZES, "--gpu", "H200"])
    assert result.exit_code == 0, result.output
    assert "Flash-Decoding" in result.output
    assert "64.01 MiB" in result.output


def test_explain_passes_every_option_on() -> None:
    options = ["--q-len=4", "--head-dim-v=64", "--dtype=float16", "--page-size=16", "--num-splits=3"]
    window = ["--window-size", "1024", "0"]
    result = CliRunner().invoke(app, ["explain", *SIZES, *options, *window, "--gpu=A100"])
    assert result.exit_code == 0, result.output
    for words in ("4 query token", "pages of 16", "A100", "num_splits=3"):
        assert words in result.output


def test_info_shows_versions_and_why_variants_do_not_run() -> None:
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    assert "torch" in result.output
    assert "variant triton" in result.output


def test_the_bare_command_shows_what_there_is() -> None:
    result = CliRunner().invoke(app, [])
    for command in ("generate", "bench", "explain", "info"):
        assert command in result.output


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Exit status of the command as a shell would run it."""
    monkeypatch.setattr(sys, "argv", ["flash-decoding", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--rows", "64"], "rows: got '64'; wanted batch x length"),
        (["bench", "--suite", "lunch"], "suite: got 'lunch'; wanted attention"),
        (["bench", "--dtype", "int4"], "dtype: got 'int4'; wanted float16 or bfloat16 or float32"),
        (["bench", "--device", "tpu"], "device: got 'tpu'; wanted cpu, cuda or cuda:N"),
        (["bench", "--device", "cuda:99"], "device: got 'cuda:99'; wanted cpu, cuda or cuda:N"),
        (["explain", *SIZES, "--gpu", "abacus"], "gpu: got 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_status_1(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_main(monkeypatch, *arguments) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"flash-decoding: {message}")
    assert told.err.count("\n") == 1
    assert told.out == ""


@pytest.mark.parametrize("package", ["typer", "rich", "matplotlib"])
def test_without_the_extra_the_command_says_how_to_get_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run_main(monkeypatch, "bench", "--device", "cpu") == 1
    install = 'pip install "flash-decoding[bench]"'
    line = f"flash-decoding: {package} is needed for this; install it with: {install}\n"
    assert capsys.readouterr().err == line


def test_the_module_is_the_command() -> None:
    assert "main()" in (ROOT / "flash_decoding" / "__main__.py").read_text()
