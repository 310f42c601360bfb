"""Memory of a generation, before and after: what fits, what a step reads, what the summary says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flash_decoding.cli.generation import memory
from flash_decoding.cli.generation.summary import Summary, in_bytes
from tests.checkpoints import save_checkpoint
from tests.generate_tools import assert_refused, call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that all tests of this file read."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(path)
    return path


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes, as a list of one number that a test may change."""
    free = [1 << 20]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    return free


def test_too_little_memory_says_which_context_fits(folder: Path, little_memory: list[int]) -> None:
    """2 layers x 2 heads x (16 + 16) elements x 4 bytes: 512 bytes a token."""
    from transformers import AutoConfig

    weights = memory.model_bytes(AutoConfig.from_pretrained(folder), torch.float32)
    little_memory[0] = weights + 100 * 512 + 511
    ask = (folder, "--prompt", "abc", "--device", "cpu", "--max-new-tokens")
    result = call(*ask, 98)
    assert_refused(result, "context: got 101 tokens: 0.00 GiB of keys and values; wanted at most 100 tokens")
    assert call(*ask, 97).exit_code == 0
    little_memory[0] = weights
    assert_refused(call(*ask, 1), "model: got 0.00 GiB of weights in torch.float32; wanted less than")


def test_a_step_reads_weights_and_what_is_visible(folder: Path) -> None:
    """Of the embedding table (260 rows of 64) a step reads one row; a tied one is the head's, and read."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    def model(kind: Any = LlamaConfig, **changes: Any) -> Any:
        sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        config = kind(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]

    def all_bytes(model: Any) -> int:
        return sum(parameter.nbytes for parameter in model.parameters())

    plain = model()
    assert memory.step_bytes(plain, 10) == all_bytes(plain) - 259 * 64 * 4 + 10 * 512
    tied = model(tie_word_embeddings=True)
    assert memory.step_bytes(tied, 10) == all_bytes(tied) + 10 * 512
    window = model(MistralConfig, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    assert memory.step_bytes(window, 10) == all_bytes(window) - 259 * 64 * 4 + 7 * 512


def test_the_summary_divides_the_rate_by_the_bound() -> None:
    """101 tokens, 100 of them in 4 s: 25 a second; 1 GB a step from 50 GB/s: 50 a second at best."""
    summary = Summary(
        attention="eager",
        prompt_tokens=7,
        new_tokens=101,
        first=0.5,
        rest=4.0,
        weight_bytes=900_000_000,
        kv_bytes=100_000_000,
        step_bytes=1e9,
        bandwidth=50e9,
    )
    assert summary.rate == 25
    assert summary.bound == 50
    rows = {str(cell) for column in summary.table().columns for cell in column.cells}
    assert "50% of the 50.0 tokens/s that the memory allows" in rows
    assert "900.00 MB" in rows


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (67e9, "67.00 GB")]
)
def test_bytes_are_spelt(count: float, text: str) -> None:
    assert in_bytes(count) == text
