"""The examples run as they are, the README shows the first, and the Llama is that of Transformers."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.checkpoints import save_checkpoint
from tests.source_tree import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert not ran.stderr


def test_the_readme_shows_the_ten_lines() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:1]
    code = (ROOT / "examples" / "decode_ten_lines.py").read_text(encoding="utf-8")
    assert shown == code.partition('"""\n\n')[2]


@torch.inference_mode()
def test_the_readme_tells_the_truth_about_models(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "register()" in block
    ]
    save_checkpoint(tmp_path)
    found: dict[str, Any] = {}
    exec(code.replace("path/to/model", str(tmp_path)), found)
    tokens = found["prompt"]["input_ids"].shape[1]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    want = model.generate(**found["prompt"], max_new_tokens=50)[0, tokens:].tolist()
    assert len(want) == 50
    assert found["plain"][0, tokens:].tolist() == want
    assert found["in_place"][0, tokens:].tolist() == want
    assert found["fast"][0].tolist() == want


def test_the_llama_is_short() -> None:
    assert (ROOT / "examples" / "llama.py").read_text(encoding="utf-8").count("\n") < 200


def saved_llama(folder: Path, *, rope: str = "default", tied: bool = False) -> Any:
    """A small random Llama, saved to ``folder`` in several shards."""
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_parameters=ROPES[rope],
        initializer_range=0.1,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model


def examples_llama() -> Any:
    """The names of the example, as attributes."""
    return type("llama", (), runpy.run_path(str(ROOT / "examples" / "llama.py")))


def assert_logits_are_as_good(got: Tensor, eager: Tensor, want: Tensor) -> None:
    """Hold fp32 logits to what Transformers' own lose in fp32 against float64.

    Both sum the same products, in orders of their own, so their errors are of one size: three times the
    largest and twice the RMS leave room for the order, as in ``tests/helpers.py``.
    """
    error, lost = got.double() - want, eager.double() - want
    assert error.abs().max() <= 3 * lost.abs().max()
    assert error.square().mean() <= 4 * lost.square().mean()


@torch.inference_mode()
@pytest.mark.parametrize(("rope", "tied"), [("default", False), ("llama3", True)])
def test_the_llama_gives_the_logits_of_transformers(
    tmp_path: Path, rope: str, tied: bool, device: torch.device
) -> None:
    theirs = saved_llama(tmp_path, rope=rope, tied=tied).to(device)
    example = examples_llama()
    model = example.load(str(tmp_path), torch.float32, device.type)
    decoder = example.Decoder(model, 120)
    tokens = torch.randint(199, (1, 120), device=device)
    got = []
    for part in tokens.split([40, 30, *[1] * 50], dim=1):  # type: ignore[no-untyped-call]
        decoder.cache.allocate(part.shape[1])
        got.append(model(part, decoder.cache, *decoder.rotary))
    eager = theirs(tokens).logits[0, [39, *range(69, 120)]]
    want = theirs.double()(tokens).logits[0, [39, *range(69, 120)]]
    assert_logits_are_as_good(torch.cat(got), eager, want)


@torch.inference_mode()
def test_the_llama_writes_what_transformers_writes(tmp_path: Path, device: torch.device) -> None:
    theirs = saved_llama(tmp_path).to(device)
    example = examples_llama()
    decoder = example.Decoder(example.load(str(tmp_path), torch.float32, device.type), 100)
    prompt = torch.randint(3, 199, (1, 50), device=device)
    wanted = theirs.generate(prompt, max_new_tokens=50, do_sample=False, pad_token_id=0)
    assert list(decoder.generate(prompt, 50, chunk=16)) == wanted[0, 50:].tolist()


@torch.inference_mode()
def test_the_llama_samples_from_the_softmax() -> None:
    """Chi-square of 4000 draws from known probabilities: 3 degrees of freedom exceed 30 once in a million."""
    example = examples_llama()
    decoder = example.Decoder(example.load("tiny", torch.float32, "cpu"), 8, temperature=0.5)
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    decoder.model = lambda *_: probabilities.log()[None] / 2  # a temperature of a half squares them back
    counts = torch.zeros(4)
    for _ in range(4000):
        decoder.step(decoder.token)
        counts[decoder.token.item()] += 1
    expected = 4000 * probabilities
    assert ((counts - expected).square() / expected).sum() < 30


@torch.inference_mode()
def test_the_llama_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    example = examples_llama()
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"attention_bias": false', '"attention_bias": true'))
    with pytest.raises(SystemExit, match="without biases"):
        example.load(str(tmp_path), torch.float32, "cpu")
    config.write_text(text.replace('"rope_type": "default"', '"rope_type": "yarn"'))
    with pytest.raises(SystemExit, match="'yarn'"):
        example.Decoder(example.load(str(tmp_path), torch.float32, "cpu"), 8)
