"""A Decoder gives the logits of eager attention, as blocks or by the model's forward, however tokens come."""

from __future__ import annotations

import copy

import pytest
import torch

from flash_decoding.decoder import Decoder
from tests.decoder_tools import DEVICES, FUSED, UNFUSED, Reading, assert_logits, make_decoder, texts_of
from tests.transformers_tools import make_model

DTYPES = [torch.float32, torch.bfloat16]
WAYS = [(family, True) for family in FUSED] + [(family, False) for family in (*FUSED, *UNFUSED)]


def read_everything(decoder: Decoder, reading: Reading) -> None:
    """Prompts over several chunks, tokens one by one, and steps of every small q_len, ragged or not."""
    reading.prefill(13, 3, 8)
    for counts in ((1, 1, 1), (1, 1, 1), (1, 0, 1), (2, 2, 2), (2, 1, 2), (0, 3, 3)):
        reading.step(*counts)
    for q_len in range(4, 9):
        reading.step(1, q_len, q_len // 2, q_len=q_len)
    assert decoder.lengths == [25, 41, 32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "fused"), WAYS)
def test_logits_of_prompts_and_steps(family: str, fused: bool, dtype: torch.dtype, device: str) -> None:
    model = make_model(family, device, dtype)
    decoder = make_decoder(model, fused=fused)
    assert decoder.is_fused == fused
    reading = Reading(decoder, texts_of(25, 41, 32, device=device))
    read_everything(decoder, reading)
    assert_logits(model, reading.texts, reading.found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_pages_make_no_difference(family: str, device: str) -> None:
    model = make_model(family, device)
    reading = Reading(make_decoder(model, page_size=16), texts_of(25, 41, 32, device=device))
    read_everything(reading.decoder, reading)
    assert_logits(model, reading.texts, reading.found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_what_is_truncated_leaves_no_trace(family: str, device: str) -> None:
    model = make_model(family, device)
    decoder = make_decoder(model)
    reading = Reading(decoder, texts_of(20, 20, 20, device=device))
    reading.prefill(10, 4, 7)
    wrong = torch.full((3, 5), 3, device=device)
    decoder.step(wrong)
    decoder.truncate([9, 4, 8])
    assert decoder.lengths == [9, 4, 8]
    assert decoder.cache.storage.cache_seqlens.tolist() == [9, 4, 8]
    decoder.truncate([9, 4, 7])
    reading.step(2, 2, 2)
    decoder.reset()
    assert decoder.lengths == [0, 0, 0]
    reading.prefill(5, 11, 1)
    reading.step(3, 3, 3)
    assert_logits(model, reading.texts, reading.found)


def test_a_model_made_of_blocks_runs_as_blocks_by_itself() -> None:
    assert all(make_decoder(make_model(family)).is_fused for family in FUSED)
    assert not any(make_decoder(make_model(family)).is_fused for family in UNFUSED)


@pytest.mark.parametrize("budget", range(1, 30))
def test_every_size_of_chunks_gives_the_same_logits(budget: int) -> None:
    model = make_model("llama")
    reading = Reading(make_decoder(model, prefill_chunk=budget, capacity=14), texts_of(13, 1, 9))
    reading.prefill(13, 1, 9)
    assert_logits(model, reading.texts, reading.found)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_hardly_differ_between_blocks_and_the_models_forward(device: str) -> None:
    model = make_model("qwen3", device)
    texts = texts_of(25, 41, 32, device=device)
    readings = [Reading(make_decoder(copy.deepcopy(model), fused=fused), texts) for fused in (True, False)]
    for reading in readings:
        read_everything(reading.decoder, reading)
    one, other = (torch.stack([x for row in reading.found for x in row.values()]) for reading in readings)
    assert torch.equal(one.argmax(dim=-1), other.argmax(dim=-1))
