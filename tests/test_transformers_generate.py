"""``generate`` as users call it gives the tokens of eager attention, one by one, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.transformers_tools import VOCAB, assert_same_tokens, make_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES = ["llama", "mistral", "gemma2", "gpt_oss"]
"""Plain; windows in all layers; windows in every other layer, with softcap; the same with sinks."""

NEW = 16


def prompt(model: Any, tokens: int = 9, batch: int = 2) -> dict[str, Tensor]:
    """Left-padded: sequence 0 is full, each of the others two tokens shorter than the one before."""
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    ids[mask == 0] = 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def greedy(model: Any, **how: Any) -> Tensor:
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | how
    tokens: Tensor = model.generate(**arguments)
    return tokens


def one_by_one(model: Any) -> Tensor:
    return greedy(model, **prompt(model, batch=1))


def padded(model: Any) -> Tensor:
    return greedy(model, **prompt(model, batch=3))


def until_the_end_token(model: Any) -> Tensor:
    return greedy(model, **prompt(model), eos_token_id=list(range(2, VOCAB, 9)))


def sampling(model: Any) -> Tensor:
    return greedy(model, **prompt(model), do_sample=True, temperature=0.8, top_k=20, top_p=0.9)


def several_sequences(model: Any) -> Tensor:
    return greedy(model, **prompt(model), do_sample=True, num_return_sequences=3)


def beams(model: Any) -> Tensor:
    return greedy(model, **prompt(model), num_beams=3, num_return_sequences=2)


def static_cache(model: Any) -> Tensor:
    return greedy(model, **prompt(model), cache_implementation="static", disable_compile=True)


def long_prompt_in_pieces(model: Any) -> Tensor:
    return greedy(model, **prompt(model, tokens=40), prefill_chunk_size=16)


def prompt_lookup(model: Any) -> Tensor:
    once = prompt(model, tokens=6, batch=1)["input_ids"]
    return greedy(model, input_ids=once.repeat(1, 3), prompt_lookup_num_tokens=3)


def continuing(model: Any) -> Tensor:
    cache = DynamicCache(config=model.config)
    first = greedy(model, **prompt(model, batch=1), past_key_values=cache)
    more = torch.cat((first, prompt(model, batch=1)["input_ids"]), dim=1)
    return greedy(model, input_ids=more, past_key_values=cache)


def continuing_a_static_cache(model: Any) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=64)
    first = greedy(model, **prompt(model, batch=1), past_key_values=cache, disable_compile=True)
    more = torch.cat((first, prompt(model, batch=1)["input_ids"]), dim=1)
    return greedy(model, input_ids=more, past_key_values=cache, disable_compile=True)


def without_a_cache(model: Any) -> Tensor:
    return greedy(model, **prompt(model), use_cache=False)


WAYS: tuple[Callable[[Any], Tensor], ...] = (
    one_by_one,
    padded,
    until_the_end_token,
    sampling,
    several_sequences,
    beams,
    static_cache,
    long_prompt_in_pieces,
    prompt_lookup,
    continuing,
    continuing_a_static_cache,
    without_a_cache,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_eager(family: str, device: str) -> None:
    model = make_model(family, device)
    for way in WAYS:
        assert_same_tokens(model, way)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_gives_the_tokens_of_eager(family: str, device: str) -> None:
    """The assistant drafts, the model checks several tokens at once and rolls its cache back."""
    model = make_model(family, device)
    assistant = make_model("llama", device)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight), alpha=0.05)
    once = prompt(model, batch=1)

    def assisted(model: Any) -> Tensor:
        assistant.set_attn_implementation(model.config._attn_implementation)
        return greedy(model, **once, assistant_model=assistant)

    assert_same_tokens(model, assisted)
