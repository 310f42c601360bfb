"""``flash-decoding generate``: the text of Transformers, on standard output alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import WORDS, save_checkpoint, tokenizer_of_bytes
from tests.generate_tools import call

NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that all tests of this file read."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path)
    return path


def written(folder: Path, prompt: str, **options: Any) -> str:
    """What ``generate`` with eager attention writes behind a prompt."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = tokenizer_of_bytes()
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    options = {"do_sample": False, **options}
    out = model.generate(ids, max_new_tokens=NEW, pad_token_id=1, **options)[0, ids.shape[1] :]
    return str(tokenizer.decode(out, skip_special_tokens=True)) + "\n"


@pytest.mark.parametrize("attention", ["flash_decoding", "eager", "sdpa"])
def test_the_text_is_that_of_transformers_and_alone_on_stdout(folder: Path, attention: str) -> None:
    options = ("--max-new-tokens", NEW, "--device", "cpu", "--attention", attention)
    result = call(folder, "--prompt", WORDS, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == written(folder, WORDS)
    for words in (
        attention,
        f"{len(WORDS)} tokens",
        f"{NEW} tokens",
        "tokens/s",
        "weights",
        "keys and values",
    ):
        assert words in result.stderr
    assert "bound" not in result.stderr, "nobody knows the bandwidth of a CPU"


@pytest.mark.gpu
def test_on_a_gpu_the_summary_has_the_bound(folder: Path) -> None:
    result = call(folder, "--prompt", WORDS, "--max-new-tokens", NEW, "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert result.stdout == written(folder, WORDS)
    for words in ("kernels", "tokens/s that the memory allows"):
        assert words in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("chunk", [7, 4096])
def test_the_prompt_goes_through_in_chunks(folder: Path, chunk: int) -> None:
    options = ("--max-new-tokens", NEW, "--device", "cpu", "--prefill-chunk", chunk)
    result = call(folder, "--prompt", WORDS, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == written(folder, WORDS)


def test_the_prompt_comes_from_a_file_or_standard_input(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(WORDS)
    options = ("--max-new-tokens", NEW, "--device", "cpu")
    want = written(folder, WORDS)
    for source in (("--file", file), ("--file", "-"), ("--prompt", "-"), ()):
        result = call(folder, *options, *source, text=WORDS)
        assert result.exit_code == 0, result.output
        assert result.stdout == want


def test_a_chat_goes_through_the_template(folder: Path) -> None:
    result = call(folder, "--prompt", "hello", "--chat", "--max-new-tokens", NEW, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout == written(folder, "<user>hello<bot>")


def test_a_seed_repeats_a_sample(folder: Path) -> None:
    options = ("--prompt", WORDS, "--max-new-tokens", NEW, "--device", "cpu", "--temperature", 1.5)
    first, again, other = (call(folder, *options, "--seed", seed) for seed in (1, 1, 2))
    assert first.exit_code == 0, first.output
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout


@pytest.mark.parametrize("narrow", [("--top-k", 1), ("--top-p", 1e-6)])
def test_sampling_from_one_token_is_greedy(folder: Path, narrow: tuple[object, ...]) -> None:
    options = ("--prompt", WORDS, "--max-new-tokens", NEW, "--device", "cpu", "--temperature", 2)
    result = call(folder, *options, *narrow)
    assert result.exit_code == 0, result.output
    assert result.stdout == written(folder, WORDS)


def test_it_stops_at_the_end_of_the_text(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path)
    ids = torch.tensor([tokenizer_of_bytes()(WORDS)["input_ids"]])
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=1)[0, ids.shape[1] :].tolist()
    stop = next(i for i in range(3, NEW) if new[i] not in new[:i])
    save_checkpoint(tmp_path, eos_token_id=new[stop])
    result = call(tmp_path, "--prompt", WORDS, "--max-new-tokens", NEW, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert f"{stop + 1} tokens" in result.stderr


def test_more_tokens_than_the_model_was_made_for_are_a_warning(folder: Path) -> None:
    result = call(folder, "--prompt", WORDS, "--max-new-tokens", 2, "--context", 600, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr, "room is no harm"
    result = call(folder, "--prompt", WORDS * 8, "--max-new-tokens", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "are more than the 512 that the model was made for" in result.stderr.replace("\n", " ")
