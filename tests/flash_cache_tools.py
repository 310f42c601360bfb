"""Caches for small models, and a loop that drives them step by step, as engines do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_decoding.transformers import FlashCache
from tests.transformers_tools import VOCAB, with_attention

FAMILIES = ("llama", "mistral", "gemma2")
PAGE_SIZES = (0, 16)

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_cache(model: Any, **sizes: Any) -> FlashCache:
    """A cache of 6 rows of 64 slots where nothing else is said, all of it NaN."""
    sizes = {"batch": 6, "capacity": 64, "device": model.device, "dtype": model.dtype} | sizes
    cache = FlashCache(model.config, **sizes)
    poison(cache)
    return cache


def poison(cache: FlashCache) -> None:
    cache.storage.keys.fill_(torch.nan)
    cache.storage.values.fill_(torch.nan)


def prompts_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(3, VOCAB, (length,)) for length in lengths]


def eager_tokens(model: Any, prompts: Sequence[Tensor], tokens: int) -> list[list[int]]:
    """What eager attention with Transformers' own cache says after each prompt, one by one."""
    with_attention(model, "eager")
    found = [
        model.generate(prompt[None].to(model.device), max_new_tokens=tokens, **GREEDY)[0, len(prompt) :]
        for prompt in prompts
    ]
    with_attention(model, "flash_decoding")
    return [tokens.tolist() for tokens in found]


@torch.no_grad()
def prefill(
    model: Any, cache: FlashCache, prompts: Sequence[Tensor], rows: slice | Sequence[int] | None = None
) -> Tensor:
    """All prompts at once, padded on the right: (rows,) the first new token of each."""
    with_attention(model, "flash_decoding")
    lengths = [len(prompt) for prompt in prompts]
    chunk = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(model.device)
    with cache.step(lengths, rows=rows):
        logits = forward(model, cache, chunk)
    last = torch.tensor(lengths, device=logits.device) - 1
    return logits[torch.arange(len(prompts), device=logits.device), last].argmax(dim=-1)


def forward(model: Any, cache: FlashCache, tokens: Tensor) -> Tensor:
    positions = cache.positions(tokens.shape[1])
    logits: Tensor = model(tokens, past_key_values=cache, position_ids=positions).logits
    return logits


@torch.no_grad()
def decode(model: Any, cache: FlashCache, first: Tensor, tokens: int) -> list[list[int]]:
    """(rows,) tokens and what follows, for all rows of the cache: so many of each."""
    with_attention(model, "flash_decoding")
    found = [first]
    while len(found) < tokens:
        with cache.step(1):
            found.append(forward(model, cache, found[-1][:, None])[:, -1].argmax(dim=-1))
    answer: list[list[int]] = torch.stack(found, dim=1).tolist()
    return answer


def states(cache: FlashCache, rows: int, q_len: int = 1) -> tuple[Tensor, Tensor]:
    heads, head_dim = cache.storage.keys.shape[3:]
    return torch.randn(rows, heads, q_len, head_dim), torch.randn(rows, heads, q_len, head_dim)


def update(cache: FlashCache, rows: int, q_len: int = 1) -> None:
    for layer in range(len(cache)):
        cache.update(*states(cache, rows, q_len), layer)
