"""Prompts go into the cache in chunks: each token once, in order, in memory that does not grow with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.profiler import profile

from flash_decoding import ops
from flash_decoding.decoder import Decoder
from flash_decoding.decoder.prefill import chunks
from flash_decoding.spec import KVCache, Options, Queries
from tests.decoder_tools import DEVICES, make_decoder, texts_of
from tests.transformers_tools import make_model

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=6)


@given(sizes=SIZES, budget=st.integers(1, 64))
def test_chunks_cover_each_token_once_in_order_and_stay_in_their_room(
    sizes: list[tuple[int, int]], budget: int
) -> None:
    lengths = [length for length, _ in sizes]
    room = [length + spare for length, spare in sizes]
    done = [0] * len(lengths)
    for chunk in chunks(lengths, budget, room):
        assert chunk.rows == sorted(set(chunk.rows))
        assert chunk.columns * len(chunk.rows) <= max(budget, len(chunk.rows))
        for row, first, count in zip(chunk.rows, chunk.first, chunk.counts, strict=True):
            assert first == done[row]
            assert count >= 1
            assert done[row] + chunk.columns <= room[row], "padding takes slots, too"
            done[row] += count
    assert done == lengths


@given(sizes=SIZES)
def test_a_large_budget_takes_one_chunk_where_rows_have_room(sizes: list[tuple[int, int]]) -> None:
    lengths = [length for length, _ in sizes]
    assert len(list(chunks(lengths, 10_000, [40] * len(lengths)))) == 1


def test_progress_counts_tokens_of_prompts_alone() -> None:
    seen: list[tuple[int, int]] = []
    decoder = make_decoder(make_model("llama"))
    decoder.prefill(texts_of(17, 1, 5), progress=lambda *counts: seen.append(counts))
    steps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(seen)]
    assert min(steps) > 0
    assert {total for _, total in seen} == {23}
    assert seen[-1][0] == 23
    assert len(seen) >= 23 // 8


CHUNK = 32


def largest_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest tensor that appears while something works, on the CPU."""
    with profile(profile_memory=True) as seen:
        work()
    return max(int(event.self_cpu_memory_usage) for event in seen.function_events or ())


def test_nothing_quadratic_is_ever_held() -> None:
    model = make_model("llama")
    heads, tokens = model.config.num_attention_heads, 1024
    assert largest_allocation(lambda: torch.zeros(tokens, tokens)) >= 4 * tokens**2
    decoder = make_decoder(model, batch=1, capacity=tokens, prefill_chunk=CHUNK)
    prompts = texts_of(tokens)
    # scores of one chunk against the whole prompt, in fp32, would be the most that is linear in it
    assert largest_allocation(lambda: decoder.prefill(prompts)) <= 4 * heads * CHUNK * tokens


@pytest.mark.gpu
def test_peak_of_a_long_prompt_is_that_of_a_chunk() -> None:
    """Four times the prompt, the same memory on top of cache and angles; a few MiB are PyTorch's own."""
    model = make_model("llama", "cuda", torch.bfloat16)
    peaks = []
    for tokens in (16_384, 65_536):
        decoder = Decoder(model, capacity=65_536, prefill_chunk=1024)
        prompts = texts_of(tokens)
        decoder.prefill([prompts[0][:2048]])
        decoder.reset()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        decoder.prefill(prompts)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del decoder
    assert peaks[1] <= peaks[0] + 2**20
    assert peaks[1] < 65_536**2 // 8  # not one bit of mask for each pair of tokens


@pytest.mark.parametrize("device", DEVICES)
def test_another_attention_takes_the_place_of_ours_in_steps(device: str) -> None:
    model = make_model("llama", device)
    calls: list[int] = []

    def counted(queries: Queries, cache: KVCache, options: Options) -> Tensor:
        calls.append(queries.q_len)
        return ops.attention(queries, cache, options, return_lse=False)[0]

    def nothing(queries: Queries, cache: KVCache, options: Options) -> Tensor:
        return torch.zeros_like(queries.q)

    texts = texts_of(9, 4, 5)
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10]], device=device)
    found = []
    for arguments in ({}, {"attention": counted}, {"attention": nothing}):
        decoder = make_decoder(model, **arguments)
        decoder.prefill(texts)
        found.append(decoder.step(tokens).clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert calls == [2] * model.config.num_hidden_layers


def test_prompts_stay_what_they_are() -> None:
    """They may lie anywhere, in either integer type."""
    decoder = make_decoder(make_model("llama"))
    texts = texts_of(9, 4, 5)
    kept = [text.clone() for text in texts]
    wanted: Any = decoder.prefill(texts)
    decoder.reset()
    found = decoder.prefill([text.int() for text in texts])
    assert torch.equal(found, wanted)
    assert all(torch.equal(text, copy) for text, copy in zip(texts, kept, strict=True))
