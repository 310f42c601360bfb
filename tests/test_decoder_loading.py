"""From a folder on disk to text: a checkpoint in shards, its tokenizer, and 2,000 tokens as from eager."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flash_decoding.decoder import Decoder
from flash_decoding.transformers import register
from tests.decoder_tools import DEVICES, GREEDY, make_tokenizer, rows_of, texts_of
from tests.transformers_tools import masks_for_float64

WORDS = 512
NEW = 2000
LENGTHS = (37, 5, 21)
SEED = 5
"""Of weights that leave no near tie: the two best logits are 2e-4 apart at least, a rounding is 1e-5."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in shards, and its tokenizer, as ``save_pretrained`` writes them."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.15,  # what comes next depends on much of the text, so that it does not go round
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("checkpoint")
    build: Any = LlamaForCausalLM  # typed in some releases of Transformers only
    build(config).save_pretrained(path, max_shard_size="200KB")
    make_tokenizer(WORDS).save_pretrained(path)
    return path


def load(folder: Path, attention: str, device: str) -> Any:
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.to(device).eval()


def runs(tokens: list[int], length: int = 4) -> int:
    """Different runs of so many tokens."""
    return len({tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)})


@torch.no_grad()
def assert_no_near_ties(model: Any, ids: Tensor, mask: Tensor, width: int) -> None:
    """Assert that rounding cannot have chosen a token, so that another order of summation gives the same.

    The two largest logits of every new token have to be further apart than four times what eager attention
    loses to float64: twice for each of two implementations, one logit up and the other down. What fails
    this tests nothing: take another seed.
    """
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = model(ids, **call).logits[:, width - 1 : -1]
    with masks_for_float64():
        exact = copy.deepcopy(model).double()(ids, **call).logits[:, width - 1 : -1]
    best = exact.topk(2, dim=-1).values
    lost = (logits - exact).abs().max()
    assert (best[..., 0] - best[..., 1]).min() > 4 * lost


@pytest.mark.parametrize("device", DEVICES)
def test_two_thousand_tokens_from_disk_are_those_of_eager(folder: Path, device: str) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(text) for text in texts_of(*LENGTHS)]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(device)
    width = batch["input_ids"].shape[1]
    call: dict[str, Any] = {"max_new_tokens": NEW} | GREEDY

    eager = load(folder, "eager", device)
    wanted = eager.generate(**batch, **call)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    assert_no_near_ties(eager, wanted, mask, width)
    rows = rows_of(wanted, width)
    assert all(runs(row) > NEW // 2 for row in rows), "a text that goes round tests little"

    model = load(folder, "flash_decoding", device)
    decoder = Decoder(model, batch=3, capacity=width + NEW, prefill_chunk=24)
    got = decoder.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **call)
    for row, wanted_row in zip(got, rows, strict=True):
        found = row.tolist()
        differs = next((i for i in range(NEW) if found[i] != wanted_row[i]), None)
        assert differs is None, f"token {differs} is {found[differs]} instead of {wanted_row[differs]}"
        assert len(found) == NEW
    assert tokenizer.decode(got[0]) == tokenizer.decode(rows[0])


@pytest.mark.parametrize("device", DEVICES)
def test_one_row_from_disk_with_drafts(folder: Path, device: str) -> None:
    model = load(folder, "flash_decoding", device)
    assistant = load(folder, "flash_decoding", device)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight), alpha=0.02)
    decoder = Decoder(model, capacity=300)
    prompts = texts_of(LENGTHS[0])
    call: dict[str, Any] = {"max_new_tokens": 200} | GREEDY
    wanted = decoder.generate(prompts, **call)[0].tolist()
    rounds: list[object] = []
    got = decoder.generate(prompts, assistant=assistant, on_tokens=rounds.append, **call)[0].tolist()
    assert got == wanted
    assert len(rounds) < 150
