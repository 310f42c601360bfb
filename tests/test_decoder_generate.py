"""``Decoder.generate`` gives the tokens of ``model.generate`` with eager attention, setting by setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from flash_decoding.decoder import Decoder
from flash_decoding.errors import InvalidInput
from tests.decoder_tools import DEVICES, GREEDY, make_decoder, make_tokenizer, rows_of, texts_of
from tests.transformers_tools import make_model, with_attention

NEW = 16
LENGTHS = (11, 4, 7)
COMMON_ENDS = list(range(3, 20))
"""So many tokens end a row that some row ends early."""

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one end": {"eos_token_id": 7},
    "many ends": {"eos_token_id": COMMON_ENDS},
    "max_length": {"max_new_tokens": None, "max_length": max(LENGTHS) + 5},
    "one token": {"max_new_tokens": 1},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated runs": {"no_repeat_ngram_size": 2},
    "no repeats of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "prompt preferred": {"encoder_repetition_penalty": 3.0},
    "bad words": {"bad_words_ids": [[5], [9, 12]], "eos_token_id": COMMON_ENDS},
    "biases": {"sequence_bias": [[[8], 4.0], [[9, 10], -5.0]]},
    "suppressed": {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [7, 8]},
    "forced end": {"forced_eos_token_id": 2, "eos_token_id": 2},
    "least length": {"min_length": max(LENGTHS) + 6, "eos_token_id": COMMON_ENDS},
    "least new tokens": {"min_new_tokens": 9, "eos_token_id": COMMON_ENDS},
    "decaying length": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7},
    "prefixes": {"prefix_allowed_tokens_fn": lambda row, _: [3 + row, 30 + row, 60 + row]},
    "no time": {"max_time": 0.0},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature and top-k": {"temperature": 0.8, "top_k": 20},
    "top-p": {"top_p": 0.7, "top_k": 0},
    "min-p": {"min_p": 0.05, "temperature": 1.5},
    "typical": {"typical_p": 0.6},
    "cutoffs": {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "with ends": {"eos_token_id": COMMON_ENDS},
    "penalised": {"repetition_penalty": 1.5, "renormalize_logits": True},
}


def wanted_of(model: Any, texts: list[Tensor], **call: Any) -> list[list[int]]:
    """What ``model.generate`` gives for the batch, padded on the left, without padding."""
    width = max(len(text) for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = text
        mask[row, width - len(text) :] = 1
    ends = call.get("eos_token_id") or []
    torch.manual_seed(5)
    eager = with_attention(model, "eager")
    found = eager.generate(ids.to(model.device), attention_mask=mask.to(model.device), **call)
    return rows_of(found, width, [ends] if isinstance(ends, int) else ends)


def assert_same(decoder: Decoder, texts: list[Tensor], **call: Any) -> list[list[int]]:
    """Assert that the Decoder gives the same tokens, twice, and holds all but the last of them."""
    call = {"max_new_tokens": NEW} | GREEDY | call
    wanted = wanted_of(decoder.model, texts, **call)
    with_attention(decoder.model, "flash_decoding")
    for _ in range(2):
        torch.manual_seed(5)
        got = decoder.generate(texts, **call)
        assert [row.tolist() for row in got] == wanted
        assert all(row.dtype == torch.int64 and row.device == decoder.device for row in got)
        held = [len(text) + len(row) - 1 for text, row in zip(texts, wanted, strict=True)]
        assert decoder.lengths == held == decoder.cache.storage.cache_seqlens.tolist()
    return wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy(setting: str, device: str) -> None:
    call = SETTINGS[setting]
    tokens = assert_same(make_decoder(make_model("llama", device)), texts_of(*LENGTHS), **call)
    if "eos_token_id" in call and "min_new_tokens" not in call:
        assert len({len(row) for row in tokens}) > 1 or setting in (
            "one end",
            "forced end",
            "decaying length",
        )


@pytest.mark.parametrize("setting", SAMPLED)
@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_with_the_same_seed(batch: int, setting: str) -> None:
    decoder = make_decoder(make_model("gemma2"), batch=batch)
    assert_same(decoder, texts_of(*LENGTHS[:batch]), do_sample=True, **SAMPLED[setting])


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SAMPLED)
def test_sampling_with_the_same_seed_on_a_gpu(setting: str) -> None:
    decoder = make_decoder(make_model("llama", "cuda"), batch=1)
    assert_same(decoder, texts_of(LENGTHS[0]), do_sample=True, **SAMPLED[setting])


def test_a_generator_takes_the_place_of_the_global_one() -> None:
    decoder = make_decoder(make_model("llama"))
    texts = texts_of(*LENGTHS)
    found = []
    for seed in (1, 1, 2):
        call = GREEDY | {"do_sample": True, "generator": torch.Generator().manual_seed(seed)}
        found.append([row.tolist() for row in decoder.generate(texts, max_new_tokens=NEW, **call)])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("device", DEVICES)
def test_stop_strings(device: str) -> None:
    model = make_model("llama", device)
    decoder, tokenizer = make_decoder(model), make_tokenizer()
    texts = texts_of(*LENGTHS)
    plain = assert_same(decoder, texts)
    strings = [f"w{plain[0][4]}", f"w{plain[1][8]}"]
    stopping: dict[str, Any] = {"stop_strings": strings, "tokenizer": tokenizer}
    got = decoder.generate(texts, max_new_tokens=NEW, **GREEDY, **stopping)
    # found as the strings are in the text: w1 is in w12 too
    places = [[any(s in f"w{token}" for s in strings) for token in row] for row in plain]
    wanted = [
        row[: hits.index(True) + 1] if True in hits else row for row, hits in zip(plain, places, strict=True)
    ]
    assert [row.tolist() for row in got] == wanted
    assert len(wanted[0]) <= 5
    with pytest.raises(InvalidInput, match="tokenizer"):
        decoder.generate(texts, max_new_tokens=NEW, stop_strings=strings)


def test_own_processors_and_criteria() -> None:
    decoder = make_decoder(make_model("llama"))
    widths: list[int] = []

    def third_token(ids: Tensor, _: object, **__: Any) -> Tensor:
        widths.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == max(LENGTHS) + 3, False, ids.shape[1] == max(LENGTHS) + 6])

    processors = LogitsProcessorList([TemperatureLogitsWarper(2.0), TopKLogitsWarper(3)])
    criteria: Any = StoppingCriteriaList([third_token])
    call: dict[str, Any] = GREEDY | {"logits_processor": processors, "do_sample": True}
    texts = texts_of(*LENGTHS)
    wanted = wanted_of(decoder.model, texts, max_new_tokens=NEW, **call)
    with_attention(decoder.model, "flash_decoding")
    torch.manual_seed(5)
    got = decoder.generate(texts, max_new_tokens=NEW, stopping_criteria=criteria, **call)
    assert [row.tolist() for row in got] == [wanted[0][:3], wanted[1], wanted[2][:6]]
    assert widths == list(range(max(LENGTHS) + 1, max(LENGTHS) + NEW + 1))


def test_the_models_own_settings_are_the_defaults() -> None:
    model = make_model("llama")
    decoder = make_decoder(model)
    texts = texts_of(*LENGTHS)
    plain = assert_same(decoder, texts)
    model.generation_config.max_new_tokens = 4
    model.generation_config.eos_token_id = plain[0][1]
    got = decoder.generate(texts)
    assert len(got[0]) == 2
    config = GenerationConfig(max_new_tokens=6, eos_token_id=plain[0][2])  # type: ignore[no-untyped-call]
    assert len(decoder.generate(texts, generation_config=config)[0]) == plain[0].index(plain[0][2]) + 1
    assert len(decoder.generate(texts, eos_token_id=None, max_new_tokens=5)[0]) <= 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_in_one_tensor(side: str) -> None:
    decoder = make_decoder(make_model("llama"))
    texts = texts_of(*LENGTHS)
    wanted = assert_same(decoder, texts)
    tokenizer = make_tokenizer()
    batch = tokenizer(
        [tokenizer.decode(text) for text in texts], padding=True, padding_side=side, return_tensors="pt"
    )
    call: dict[str, Any] = {"max_new_tokens": NEW} | GREEDY
    got = decoder.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **call)
    assert [row.tolist() for row in got] == wanted
    if side == "left":  # padding tokens are found as model.generate finds them
        assert [row.tolist() for row in decoder.generate(batch["input_ids"], **call)] == wanted


def test_tokens_are_told_in_order_and_false_stops() -> None:
    decoder = make_decoder(make_model("llama"))
    texts = texts_of(*LENGTHS)
    call: dict[str, Any] = {"max_new_tokens": NEW} | GREEDY | {"eos_token_id": COMMON_ENDS}
    told: list[list[list[int]]] = []
    held: list[list[int]] = []

    def listen(new: list[list[int]]) -> None:
        told.append(new)
        held.append(decoder.lengths)

    got = [row.tolist() for row in decoder.generate(texts, on_tokens=listen, **call)]
    ends = [len(text) + len(row) for text, row in zip(texts, got, strict=True)]
    for row, end in enumerate(ends):
        assert max(lengths[row] for lengths in held) <= end, "a row that is over stays as it is"
    assert [[token for new in told for token in new[row]] for row in range(3)] == got
    assert len(told) == max(len(row) for row in got)
    assert all(len(new) <= 1 for step in told for new in step)
    told.clear()

    def until_the_second(new: list[list[int]]) -> bool:
        told.append(new)
        return len(told) < 2

    short = [row.tolist() for row in decoder.generate(texts, on_tokens=until_the_second, **call)]
    assert short == [row[:2] for row in got]
    kept = [len(text) + len(row) - 1 for text, row in zip(texts, short, strict=True)]
    assert decoder.lengths == kept == decoder.cache.storage.cache_seqlens.tolist()


def test_progress_of_the_prompts() -> None:
    seen: list[tuple[int, int]] = []
    decoder = make_decoder(make_model("llama"))
    decoder.generate(texts_of(*LENGTHS), max_new_tokens=1, progress=lambda *counts: seen.append(counts))
    done = [tokens for tokens, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (sum(LENGTHS), sum(LENGTHS))


def test_a_row_may_fill_its_last_slot() -> None:
    decoder = make_decoder(make_model("llama"), capacity=max(LENGTHS) + NEW - 1)
    assert_same(decoder, texts_of(*LENGTHS))
