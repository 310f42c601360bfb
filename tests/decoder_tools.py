"""Decoders of small models, the texts they read, and eager attention to hold them to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flash_decoding.decoder import Decoder
from tests.flash_cache_tools import poison
from tests.transformers_tools import FAMILIES, VOCAB, with_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED = ("llama", "codellama", "mistral", "qwen2", "qwen3")
UNFUSED = tuple(sorted(set(FAMILIES) - set(FUSED)))

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_decoder(model: Any, **arguments: Any) -> Decoder:
    """Three rows of 64 slots where nothing else is said, all of them NaN; prompts in chunks of 8 tokens."""
    decoder = Decoder(model, **{"batch": 3, "capacity": 64, "prefill_chunk": 8} | arguments)
    poison(decoder.cache)
    return decoder


def texts_of(*lengths: int, device: str = "cpu") -> list[Tensor]:
    return [torch.randint(3, VOCAB, (length,), device=device) for length in lengths]


@torch.no_grad()
def eager_logits(model: Any, texts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For each text (tokens, vocabulary), from a copy of the model with eager attention in ``dtype``."""
    eager = with_attention(copy.deepcopy(model).to(dtype), "eager")
    return [eager(text[None].to(model.device)).logits[0] for text in texts]


def assert_logits(model: Any, texts: Sequence[Tensor], found: Sequence[dict[int, Tensor]]) -> None:
    """Assert that logits are as close to eager's in float64 as eager's in the model's dtype are.

    The budget is that of ``tests/transformers_tools.py``: three times the largest error, twice the RMS error,
    and a rounding of the largest logit.

    Args:
        model: whose logits these are.
        texts: (tokens,) each.
        found: for each text, logits (vocabulary,) by the place of the token that they stand behind.
    """
    exact = eager_logits(model, texts, torch.float64)
    lossy = eager_logits(model, texts, model.dtype)
    places = [sorted(logits) for logits in found]
    assert all(places), "nothing to compare"
    ideal = torch.cat([row[place] for row, place in zip(exact, places, strict=True)])
    lost = torch.cat([row[place] for row, place in zip(lossy, places, strict=True)]).double() - ideal
    got = torch.stack([logits[at] for logits, place in zip(found, places, strict=True) for at in place])
    error = got.double() - ideal
    floor = torch.finfo(model.dtype).eps * ideal.abs().max()
    largest, budget = error.abs().max(), 3 * lost.abs().max() + floor
    assert largest <= budget, f"largest error {largest:.3g}, budget {budget:.3g}"
    rms, budget = error.square().mean().sqrt(), 2 * lost.square().mean().sqrt() + floor
    assert rms <= budget, f"RMS error {rms:.3g}, budget {budget:.3g}"


class Reading:
    """A decoder that reads texts piece by piece, and the logits it gave on the way.

    Args:
        decoder: with empty rows.
        texts: one for each row.
    """

    def __init__(self, decoder: Decoder, texts: Sequence[Tensor]) -> None:
        self.decoder, self.texts = decoder, texts
        self.found: list[dict[int, Tensor]] = [{} for _ in texts]

    def prefill(self, *lengths: int) -> None:
        logits = self.decoder.prefill(
            [text[:length] for text, length in zip(self.texts, lengths, strict=True)]
        )
        for row, length in enumerate(lengths):
            self.found[row][length - 1] = logits[row].clone()

    def step(self, *counts: int, q_len: int = 0) -> None:
        """So many tokens of each text, in a step of as many columns as the longest, or of ``q_len``."""
        before = self.decoder.lengths
        tokens = torch.zeros(len(counts), q_len or max(counts), dtype=torch.int64, device=self.decoder.device)
        for row, (at, count) in enumerate(zip(before, counts, strict=True)):
            tokens[row, :count] = self.texts[row][at : at + count]
        logits = self.decoder.step(tokens, counts=counts)
        for row, (at, count) in enumerate(zip(before, counts, strict=True)):
            self.found[row] |= {at + i: logits[row, i].clone() for i in range(count)}


def make_tokenizer(words: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are the tokens 3, 4, ...; the last is one that Transformers' stop strings try out."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words - 1)}
    vocabulary["abcdef"] = words - 1
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, padding_side="left", **special
    )
    return fast


def rows_of(tokens: Tensor, width: int, ends: Sequence[int] = ()) -> list[list[int]]:
    """New tokens of what ``model.generate`` returns: behind the prompts, up to the token that ended a row."""
    answer = []
    for row in tokens[:, width:].tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        answer.append(row[: stops[0] + 1] if stops else row)
    return answer
