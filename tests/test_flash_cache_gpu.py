"""FlashCache on a GPU: bookkeeping that never waits for it, and forwards that a CUDA graph repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding.errors import Unsupported
from flash_decoding.transformers import FlashCache
from tests.flash_cache_tools import (
    FAMILIES,
    PAGE_SIZES,
    eager_tokens,
    forward,
    make_cache,
    prefill,
    prompts_of,
)
from tests.transformers_tools import make_model, with_attention

pytestmark = pytest.mark.gpu

NEW = 30


@contextmanager
def no_waiting() -> Iterator[None]:
    """Turn every wait of the host for the device into an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(model: Any, cache: FlashCache, tokens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one forward over all rows; the lengths are as before."""
    before = cache.lengths
    with cache.step(tokens.shape[1]):
        forward(model, cache, tokens)  # compiles
    cache.truncate(before)
    graph = torch.cuda.CUDAGraph()
    with cache.step(tokens.shape[1]):
        with torch.cuda.graph(graph):
            logits = forward(model, cache, tokens)
        graph.replay()
    cache.truncate(before)
    return graph, logits


@torch.no_grad()
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_captured_step_serves_all_lengths(family: str, page_size: int) -> None:
    model = make_model(family, "cuda")
    prompts = prompts_of(11, 1, 20)
    cache = make_cache(model, batch=3, page_size=page_size)
    newest = prefill(model, cache, prompts)[:, None]
    graph, logits = captured(model, cache, newest)
    found = [newest.clone()]
    while len(found) < NEW:
        with cache.step(1):
            graph.replay()
        newest.copy_(logits[:, -1:].argmax(dim=-1))
        found.append(newest.clone())
    assert cache.lengths == [len(prompt) + NEW - 1 for prompt in prompts]
    assert torch.cat(found, dim=1).tolist() == eager_tokens(model, prompts, NEW)


@torch.no_grad()
def test_one_captured_step_serves_rows_that_end() -> None:
    model = make_model("mistral", "cuda")
    prompts = prompts_of(9, 4)
    cache = make_cache(model, batch=2, capacity=24, page_size=8)
    newest = prefill(model, cache, prompts)[:, None]
    graph, logits = captured(model, cache, newest)
    found = [[int(token)] for token in newest]
    for row in [0] * 15 + [1] * 10:
        with cache.step([int(row == 0), int(row == 1)], q_len=1):
            graph.replay()
        newest[row] = logits[row, -1].argmax()
        found[row].append(int(newest[row]))
    wanted = eager_tokens(model, prompts, 16)
    assert cache.lengths == [24, 14] == cache.storage.cache_seqlens.tolist()
    assert found == [wanted[0], wanted[1][:11]]


@torch.no_grad()
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_nothing_waits_for_the_device(page_size: int) -> None:
    model = with_attention(make_model("llama", "cuda"), "flash_decoding")
    cache = make_cache(model, batch=3, page_size=page_size)
    tokens = torch.ones(3, 5, dtype=torch.int64, device="cuda")
    chunk = tokens[:2, :4].contiguous()
    model(tokens, past_key_values=cache)  # compiles, and makes what is made once
    with cache.step([4, 2], rows=[2, 0]):
        forward(model, cache, chunk)
    cache.reset()
    with no_waiting():
        model(tokens, past_key_values=cache)
        with cache.step([4, 2], rows=[2, 0]):
            forward(model, cache, chunk)
        cache.truncate([3, 2, 1])
        cache.crop(-1)
    assert cache.lengths == [2, 1, 0] == cache.storage.cache_seqlens.tolist()


@torch.no_grad()
def test_a_step_cannot_begin_inside_of_a_capture() -> None:
    model = with_attention(make_model("llama", "cuda"), "flash_decoding")
    cache = make_cache(model, batch=1)
    tokens = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    model(tokens, past_key_values=cache)
    k, v = (torch.zeros(1, 2, 1, 16, device="cuda") for _ in range(2))
    with pytest.raises(Unsupported, match="open a step around"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        cache.update(k, v, 0)
    assert cache.lengths == [1]
