"""The model suite from the command line to its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, PretrainedConfig
from typer.testing import CliRunner

from flash_decoding.bench import suites
from flash_decoding.bench.baselines import decoder_models, transformers_models
from flash_decoding.bench.baselines.model_columns import BOUND, model_columns
from flash_decoding.bench.column import Heading
from flash_decoding.bench.models import bandwidth
from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.models.plan import chosen_columns, numbers
from flash_decoding.bench.models.plot import points_of, save_plot
from flash_decoding.bench.models.row import ModelRow
from flash_decoding.bench.models.source import Source
from flash_decoding.bench.models.table import render
from flash_decoding.bench.record import Cell, Record
from flash_decoding.bench.request import Request
from flash_decoding.bench.timing import Effort, Timing
from flash_decoding.cli.commands import app
from flash_decoding.errors import InvalidInput, MissingDependency, Unsupported
from tools.readme_tables import table

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as Transformers saves it."""
    path = tmp_path / "small-llama"
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bandwidth.COPIED_BYTES, "cpu", 1 << 20)


def bench(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "--suite", "model", "--device", "cpu", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_checkpoint_is_measured_and_leaves_a_record_and_a_plot(folder: Path, tmp_path: Path) -> None:
    sizes = ["--contexts", "64,128", "--batch", "1,2", "--steps", "2", "--dtype", "float32"]
    status, text = bench("--model", str(folder), *sizes, "--out", str(tmp_path))
    assert status == 0, text
    for words in ("tokens/s", "ours / bound", "1 x 64", "2 x 128", "left out: CUDA only"):
        assert words in text
    (path,) = tmp_path.glob("model-small-llama-*-float32-*.json")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(path.read_text())
    assert (record["suite"], record["schema"]) == ("model", 1)
    assert "its checkpoint" in record["title"]
    assert {"commit", "date", "command", "driver", "copy_gb_per_s"} <= set(record["environment"])
    assert "transformers" in record["environment"]["libraries"]
    assert [(r["batch"], r["context"]) for r in record["rows"]] == [(1, 64), (1, 128), (2, 64), (2, 128)]
    row = record["rows"][1]
    assert row["lengths"] == [128]
    assert row["kv_bytes"] == 128 * 2 * 2 * 16 * 4 * 2  # tokens, k and v, heads, head_dim, fp32, layers
    assert row["bytes"] == row["kv_bytes"] + row["weight_bytes"]
    states = {name: cell["status"] for name, cell in row["cells"].items()}
    assert states == {
        "eager": "timed",
        "sdpa": "timed",
        "FlashAttention unsplit": "left out",
        "one block per head (FasterTransformer's scheme)": "left out",
        "ours": "timed",
        "bound": "timed",
    }
    ours = row["cells"]["ours"]
    assert ours["tokens_per_s"] == pytest.approx(1e6 / ours["median_us"])
    assert ours["times_floor"] == pytest.approx(ours["median_us"] / row["cells"]["bound"]["median_us"])
    assert ours["samples"] == 2
    assert ours["error"] <= ours["allowed_error"]


def test_ragged_batches_of_chosen_columns(folder: Path, tmp_path: Path) -> None:
    options = ["--contexts", "128", "--batch", "3", "--ragged", "--columns", "sdpa, ours", "--no-plot"]
    status, text = bench("--model", str(folder), *options, "--steps", "1", "--out", str(tmp_path))
    assert status == 0, text
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    assert row["lengths"] == [16, 72, 128]
    assert list(row["cells"]) == ["sdpa", "ours", "bound"]
    assert {cell["status"] for cell in row["cells"].values()} == {"timed"}
    assert "lengths from an eighth" in record["title"]
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no-such-model"}, "model: got 'no-such-model'; wanted a folder"),
        ({"contexts": "512,x"}, "contexts: got '512,x'; wanted positive integers"),
        ({"contexts": "1"}, "contexts: got 1; wanted sequences of more than 1"),
        ({"batch": "0"}, "batch: got '0'"),
        ({"ragged": True}, "batch: got 1; wanted 2 or more"),
        ({"steps": 0}, "steps: got 0; wanted 1 or more"),
        ({"columns": "ours,lunch"}, "columns: got 'ours,lunch'; wanted names"),
        ({"compiled_contexts": "some"}, "compiled-contexts: got 'some'"),
        ({"rows": "1x64"}, "rows: got '1x64'; wanted nothing: the suite for it is attention"),
        ({"suite": "attention", "ragged": True}, "ragged: got True; wanted nothing"),
        ({"suite": "attention", "contexts": "512"}, "contexts: got '512'; wanted nothing"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    request = dataclasses.replace(Request(suite="model", device="cpu", out=tmp_path), **options)
    with pytest.raises(InvalidInput) as refused:
        suites.run(request, Console(file=io.StringIO()))
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MixtralConfig(num_local_experts=4), "mixture of experts"),
        (MistralConfig(sliding_window=128), "full attention"),
        (PretrainedConfig(), "no layers"),
    ],
    ids=["experts", "window", "no text model"],
)
def test_models_whose_reads_cannot_be_counted_are_refused(
    config: PretrainedConfig, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda _: config)
    with pytest.raises(Unsupported, match=reason):
        Source.find(str(tmp_path))


def test_without_transformers_the_suite_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r'pip install "flash-decoding\[transformers\]"'):
        suites.run(Request(suite="model", device="cpu", plot=False), Console(file=io.StringIO()))


def test_numbers_are_taken_once_each_in_their_order() -> None:
    assert numbers("contexts", "512, 64,512", ()) == (512, 64)
    assert numbers("contexts", None, (1, 2)) == (1, 2)


def test_a_gpu_has_the_compiled_column_in_place_of_the_plain_one() -> None:
    on_gpu = [column.name for column in model_columns(torch.device("cuda"))]
    on_cpu = [column.name for column in model_columns(CPU)]
    assert on_gpu[:2] == ["eager", "sdpa compiled"]
    assert on_cpu[:2] == ["eager", "sdpa"]
    assert on_gpu[2:] == on_cpu[2:]
    assert [c.name for c in chosen_columns("ours", model_columns(CPU))] == ["ours", "bound"]


def example(*batches: int) -> Record[ModelRow]:
    """Made-up numbers: a step of 10 ms in eager, 2 ms in ours and 1 ms at the bound; compiled at 512 only."""
    columns: tuple[Heading, ...] = (
        transformers_models.EAGER,
        transformers_models.COMPILED,
        decoder_models.OURS,
        BOUND,
    )
    rows = []
    for batch in batches:
        for context in (512, 4096):
            case = ModelCase(
                context=context,
                lengths=(context,) * batch,
                burst=1,
                layers=2,
                heads_kv=2,
                head_dim=64,
                dtype=torch.bfloat16,
                device=CPU,
            )
            cells = {
                "eager": timed(10e-3),
                "sdpa compiled": timed(4e-3) if context == 512 else Cell.failed("out of memory"),
                "ours": timed(2e-3),
                "bound": Cell.computed(1e-3),
            }
            rows.append(ModelRow(cells, case, 10**9, 2 * 10**9, {"ours": 5 * 10**9}))
    told = {"device": "cuda", "commit": "0" * 40}
    return Record("model", "a title", told, columns, Effort(budget_s=1.0), rows)


def timed(seconds: float) -> Cell:
    return Cell("timed", timing=Timing(seconds, seconds, seconds, 5, 1))


def test_the_table_shows_speeds_and_reasons() -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(render(example(1)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in ("100", "250", "500", "1000", "50%", "2.00", "failed: out of memory"):
        assert words in text


def test_the_record_has_speeds_and_peaks_of_memory() -> None:
    (first, _) = example(4).to_json()["rows"]
    assert first["cells"]["ours"]["tokens_per_s"] == pytest.approx(2000)
    assert first["cells"]["ours"]["peak_bytes"] == 5 * 10**9
    assert first["cells"]["eager"]["peak_bytes"] is None
    assert first["bytes"] == 10**9 + 4 * 512 * 2 * 2 * 64 * 2 * 2


@pytest.mark.parametrize("batches", [(1,), (1, 16)])
def test_the_plot_has_a_panel_for_each_batch(batches: tuple[int, ...], tmp_path: Path) -> None:
    record = example(*batches)
    save_plot(record, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    contexts, speeds = zip(*points_of(record.rows[:2], "eager"), strict=True)
    assert (contexts, speeds) == ((512, 4096), (pytest.approx(100), pytest.approx(100)))
    assert [context for context, _ in points_of(record.rows[:2], "sdpa compiled")] == [512]


def test_the_readme_table_is_made_from_the_record() -> None:
    lines = table(example(1).to_json()).splitlines()
    assert lines[0] == "| context, tokens/s | eager | sdpa compiled | ours | bound | ours / bound |"
    assert lines[2] == "| 512 | 100 | 250 | **500** | 1000 | 50% |"
    assert lines[3] == "| 4096 | 100 | - | **500** | 1000 | 50% |"
    assert table(example(1, 16).to_json()).splitlines()[4].startswith("| 16 x 512 | 1600 |")
