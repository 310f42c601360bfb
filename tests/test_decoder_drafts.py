"""Drafts change how fast tokens come, and not which: greedy ones are the same, samples have the same odds."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from flash_decoding.decoder import Decoder
from flash_decoding.decoder.drafts import Text
from flash_decoding.decoder.request import Request, read_request
from flash_decoding.decoder.sampling import Drafts, verified
from flash_decoding.errors import InvalidInput, Unsupported
from tests.decoder_tools import DEVICES, GREEDY, make_decoder, make_tokenizer, texts_of
from tests.transformers_tools import make_model

NEW = 24
LENGTHS = (11, 4, 7)
COMMON_ENDS = list(range(3, 12))

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "many ends": {"eos_token_id": COMMON_ENDS},
    "penalties": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3},
    "least new tokens": {"min_new_tokens": 9, "eos_token_id": COMMON_ENDS},
    "stop strings": {"stop_strings": ["w1"], "tokenizer": make_tokenizer()},
    "one likely token": {"do_sample": True, "top_k": 1},
}


def relative(model: Any, alpha: float = 0.05) -> Any:
    """A model close enough that drafts are accepted, far enough that some are not."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight), alpha=alpha)
    return other


def repeated(batch: int) -> list[Tensor]:
    """Texts that repeat themselves, so that there is something to look up."""
    return [text.repeat(3) for text in texts_of(*LENGTHS[:batch])]


def rounds_of(decoder: Decoder, texts: list[Tensor], **call: Any) -> tuple[list[list[int]], list[list[int]]]:
    """New tokens of each row, and how many came in each round."""
    told: list[list[list[int]]] = []
    found = decoder.generate(texts, on_tokens=told.append, **{"max_new_tokens": NEW} | GREEDY | call)
    tokens = [row.tolist() for row in found]
    assert [[token for new in told for token in new[row]] for row in range(len(texts))] == tokens
    held = [len(text) + len(row) - 1 for text, row in zip(texts, tokens, strict=True)]
    assert decoder.lengths == held == decoder.cache.storage.cache_seqlens.tolist()
    return tokens, [[len(new) for new in step] for step in told]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", ["assistant", "lookup"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_tokens_as_without_drafts(
    setting: str, family: str, batch: int, source: str, device: str
) -> None:
    decoder = make_decoder(make_model(family, device), batch=batch)
    drafts: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if source == "assistant":
        drafts = {"assistant": relative(decoder.model), "num_assistant_tokens": 3}
    if setting in ("penalties", "least new tokens") and batch > 1:
        # padding on the left is part of what these see: rows of one length have none
        texts = [text.repeat(3) for text in texts_of(5, 5, 5)]
    else:
        texts = repeated(batch)
    wanted, _ = rounds_of(decoder, texts, **SETTINGS[setting])
    for _ in range(2):
        got, counts = rounds_of(decoder, texts, **SETTINGS[setting], **drafts)
        assert got == wanted
    if setting == "nothing" and source == "assistant":
        assert max(max(step) for step in counts) > 1, "no draft was right"
        assert len(counts) < NEW


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spare", range(5))
def test_no_slots_are_needed_for_drafts(spare: int, device: str) -> None:
    """Prompt and new tokens may fill the rows: drafts that would not fit are not drawn."""
    texts = repeated(3)
    capacity = max(len(text) for text in texts) + NEW - 1 + spare
    decoder = make_decoder(make_model("llama", device), capacity=capacity)
    wanted, _ = rounds_of(decoder, texts)
    for drafts in ({"prompt_lookup_num_tokens": 4}, {"assistant": relative(decoder.model)}):
        assert rounds_of(decoder, texts, **drafts)[0] == wanted


@pytest.mark.parametrize("device", DEVICES)
def test_a_text_that_repeats_itself_is_soon_known(device: str) -> None:
    """Without attention the next token follows from the last one: sooner or later, texts go round."""
    model = make_model("llama", device)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    decoder = make_decoder(model, batch=2)
    texts = texts_of(3, 5)
    wanted, _ = rounds_of(decoder, texts, max_new_tokens=50)
    got, counts = rounds_of(decoder, texts, max_new_tokens=50, prompt_lookup_num_tokens=4)
    assert got == wanted
    assert max(max(step) for step in counts) == 5
    assert len(counts) <= 30


@pytest.mark.parametrize("call", [{}, {"do_sample": True, "temperature": 1.3}], ids=["greedy", "sampled"])
def test_a_twin_is_always_right(call: dict[str, Any]) -> None:
    model = make_model("llama")
    decoder = make_decoder(model, batch=1)
    _, counts = rounds_of(decoder, texts_of(9), assistant=copy.deepcopy(model), max_new_tokens=25, **call)
    assert counts == [[1], [6], [6], [6], [6]]


def test_a_stranger_is_hardly_ever_right_and_does_no_harm() -> None:
    decoder = make_decoder(make_model("llama"))
    texts = texts_of(*LENGTHS)
    stranger = relative(decoder.model, alpha=5.0)
    got, counts = rounds_of(decoder, texts, assistant=stranger)
    assert got == rounds_of(decoder, texts)[0]
    assert len(counts) > NEW // 2


def test_false_stops_rounds_too() -> None:
    decoder = make_decoder(make_model("llama"))
    texts = repeated(3)
    wanted, _ = rounds_of(decoder, texts)
    seen: list[list[list[int]]] = []

    def twice(new: list[list[int]]) -> bool:
        seen.append(new)
        return len(seen) < 2

    call: dict[str, Any] = GREEDY | {"assistant": relative(decoder.model)}
    got = decoder.generate(texts, on_tokens=twice, max_new_tokens=NEW, **call)
    assert len(seen) == 2
    for row, tokens in enumerate(got):
        assert tokens.tolist() == wanted[row][: len(tokens)]
        assert len(tokens) == sum(len(step[row]) for step in seen)


def test_an_assistant_keeps_its_decoder_or_brings_one() -> None:
    model = make_model("llama")
    decoder = make_decoder(model)
    texts, other = texts_of(*LENGTHS), relative(model)
    wanted, _ = rounds_of(decoder, texts)
    assert rounds_of(decoder, texts, assistant=other)[0] == wanted
    kept = decoder._assistant
    assert kept is not None
    assert kept.model is other
    assert rounds_of(decoder, texts, assistant=other)[0] == wanted
    assert decoder._assistant is kept
    own = make_decoder(other, capacity=11 + NEW + 4)
    assert rounds_of(decoder, texts, assistant=own)[0] == wanted
    assert decoder._assistant is kept


def test_assistants_that_do_not_fit_are_refused() -> None:
    model = make_model("llama")
    decoder = make_decoder(model)
    texts = texts_of(*LENGTHS)
    other = relative(model)
    small = copy.deepcopy(other)
    small.config.vocab_size = 95
    for assistant, match in (
        (decoder, "itself"),
        (make_decoder(other, batch=2), "2 rows"),
        (make_decoder(other, capacity=11 + NEW + 3), "capacity"),
        (small, "a vocabulary of 95"),
    ):
        with pytest.raises(InvalidInput, match=match):
            rounds_of(decoder, texts, assistant=assistant)
    with pytest.raises(InvalidInput, match="one source"):
        rounds_of(decoder, texts, assistant=other, prompt_lookup_num_tokens=3)
    with pytest.raises(InvalidInput, match="num_assistant_tokens"):
        rounds_of(decoder, texts, assistant=other, num_assistant_tokens=0)
    with pytest.raises(Unsupported, match="EncoderRepetitionPenalty"):
        rounds_of(decoder, texts, assistant=other, encoder_repetition_penalty=2.0)
    assert decoder.lengths == [0, 0, 0]


def request_of(**settings: Any) -> Request:
    config = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    return read_request(
        make_model("llama"),
        texts_of(3),
        generation_config=config,
        logits_processor=None,
        stopping_criteria=None,
        options={"max_new_tokens": 8},
    )


def assert_odds(tokens: Tensor, odds: Tensor) -> None:
    """Assert that each token came about as often as its odds say: within five standard deviations."""
    seen = torch.bincount(tokens, minlength=len(odds)).double()
    deviation = (len(tokens) * odds * (1 - odds)).sqrt()
    assert ((seen - len(tokens) * odds).abs() <= 5 * deviation + 1e-9).all(), (seen / len(tokens), odds)


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "picked"])
def test_samples_have_the_odds_of_the_model_whatever_was_drafted(drawn: bool) -> None:
    """Each place behind the ones kept: the odds of the token there are those of the model."""
    many, words = 60_000, 7
    p = (torch.randn(3, words) * 1.5).log_softmax(dim=-1)
    q = (torch.randn(2, words) * 1.5).softmax(dim=-1)
    if drawn:
        guess = torch.stack([torch.multinomial(row, many, replacement=True) for row in q], dim=1)
        chances = q.expand(many, -1, -1)
    else:
        guess, chances = p[:2].argmax(dim=-1).expand(many, -1), None
    drafts = Drafts(guess, [2] * many, chances)
    tokens, kept = verified(p.expand(many, -1, -1), drafts, request_of(do_sample=True, top_k=0))
    for place in range(3):
        reached = kept >= place
        assert reached.sum() > 500
        assert_odds(tokens[reached, place], p[place].double().exp())
    # what is expected to be kept of the first draft: the overlap of both odds
    likely = p[0].exp().double()
    expected = torch.minimum(likely, q[0].double()).sum() if drawn else likely.max()
    share = (kept > 0).double().mean()
    assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / many)


def test_drafts_that_are_not_meant_are_never_kept() -> None:
    scores = torch.full((4, 3, 5), -50.0)
    scores[:, :, 1] = 50.0
    drafts = Drafts(torch.ones(4, 2, dtype=torch.int64), [0, 1, 2, 0])
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        tokens, kept = verified(scores, drafts, request_of(**settings))
        assert kept.tolist() == [0, 1, 2, 0]
        assert (tokens == 1).all()


def test_equal_odds_keep_everything() -> None:
    scores = torch.randn(50, 4, 9)
    guess = torch.randint(9, (50, 3))
    drafts = Drafts(guess, [3] * 50, scores[:, :-1].softmax(dim=-1))
    tokens, kept = verified(scores, drafts, request_of(do_sample=True, top_k=0))
    assert (kept == 3).all()
    assert torch.equal(tokens[:, :3], guess)


def test_text_is_looked_up_where_its_longest_run_was_last() -> None:
    text = Text([5, 1, 2, 7, 8, 1, 2, 9, 3, 2], longest=2)
    assert text.continuation(2) == [9, 3]  # 3, 2 is new; 2 was last followed by 9
    assert text.continuation(5) == [9, 3, 2, 9, 3]
    text.extend([7, 1])
    text.extend([7, 1, 2])
    assert text.continuation(2) == [9, 3]  # 1, 2 was last followed by 9
    assert text.continuation(0) == []
    text.extend([7, 1, 2, 6])
    assert text.continuation(3) == []
    assert Text([4], longest=2).continuation(3) == []
