"""What ``flash-decoding generate`` refuses: one line, exit status 2, and no traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_decoding.cli.generation import checkpoint
from tests.checkpoints import save_checkpoint
from tests.generate_tools import assert_refused, call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that all tests of this file read."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "prompt: got no text"),
        (["--prompt", "a", "--file", "b"], "prompt: got both --prompt and --file"),
        (["--file", "nowhere.txt"], "file: got 'nowhere.txt'; wanted a text file"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens: got 0; wanted 1 or more"),
        (["--prompt", "a", "--context", "9"], "context: got 9 tokens; wanted 257 or more"),
        (["--prompt", "a", "--temperature", "-1"], "temperature: got -1.0"),
        (["--prompt", "a", "--top-p", "0.5"], "top_p: got 0.5; wanted a temperature above 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "2"], "top_p: got 2.0; wanted a share"),
        (["--prompt", "a", "--attention", "magic"], "attention: got 'magic'; wanted flash_decoding"),
        (["--prompt", "a", "--dtype", "int4"], "dtype: got 'int4'; wanted float16"),
        (["--prompt", "a", "--device", "tpu"], "device: got 'tpu'; wanted cpu, cuda or cuda:N"),
        (["--prompt", "a", "--prefill-chunk", "0"], "prefill_chunk: got 0; wanted 1 or more"),
    ],
)
def test_bad_options_are_one_line_and_status_2(folder: Path, options: list[str], message: str) -> None:
    assert_refused(call(folder, *options), message)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "not/a/hub/id"])
def test_a_folder_that_is_not_there(name: str) -> None:
    assert_refused(call(name, "--prompt", "a"), f"model: got '{name}'; wanted a folder that exists")


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    where = f"model: got '{tmp_path}'; wanted "
    ask = (tmp_path, "--prompt", "a", "--device", "cpu")
    assert_refused(call(*ask), where + "one with a config.json")
    save_checkpoint(tmp_path)
    tokenizer = tmp_path / "tokenizer.json"
    kept = tokenizer.read_bytes()
    tokenizer.unlink()
    assert_refused(call(*ask), where + "one with a tokenizer")
    tokenizer.write_bytes(kept)
    first, *_ = sorted(tmp_path.glob("*.safetensors"))
    first.unlink()
    assert_refused(call(*ask), where + "a checkpoint with all its weights")
    forget(tmp_path, first.name)
    assert_refused(call(*ask), where + "a checkpoint with all its weights; it lacks ")
    for shard in tmp_path.glob("*.safetensors*"):
        shard.unlink()
    assert_refused(call(*ask), where + "a checkpoint with all its weights")


def forget(folder: Path, shard: str) -> None:
    """Take a shard out of the index, as if its weights had never been."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard}
    path.write_text(json.dumps(index))


def test_a_tokenizer_without_a_template_knows_no_chat(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, chat=False)
    assert_refused(call(tmp_path, "--prompt", "a", "--chat"), "chat: got a tokenizer without a chat template")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "t5 is no causal language model"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is no causal"),
        ({"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "a.B"}}, "code of its own"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = call(tmp_path, "--prompt", "a")
    assert_refused(result, f"generating with '{tmp_path}'")
    assert message in result.stderr


def test_a_device_without_room_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(checkpoint, "load_model", full)
    assert_refused(call(folder, "--prompt", "a", "--device", "cpu"), "out of memory")


def test_without_transformers_it_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = call(folder, "--prompt", "a", "--device", "cpu")
    assert_refused(result, "transformers is needed for this; install it with: pip install")
