"""Where drafts come from: a smaller model, or the text itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

from flash_decoding.cache.ledger import upload
from flash_decoding.decoder.prompts import Ids
from flash_decoding.decoder.request import Request
from flash_decoding.decoder.rows import Rows
from flash_decoding.decoder.sampling import Drafts, pick, processed_by_row
from flash_decoding.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from flash_decoding.decoder.decoder import Decoder

KNOW_THEIR_ROW = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
"""Processors that look up something of their own for each row of the batch."""


class Drafter(Protocol):
    """Guesses tokens."""

    drafted: int
    """Tokens of a guess at most."""

    def begin(self) -> None:
        """Read the prompts."""

    def draft(self, rows: Rows, wanted: list[int], ids: Ids | None) -> Drafts:
        """Guess what comes behind the rows.

        Args:
            rows: what they have.
            wanted: tokens to guess for each, at most ``drafted``; 0 for a row that wants none.
            ids: where guesses are written behind the tokens of their row, if anything reads them.
        """


def check_speculation(request: Request, has_assistant: bool) -> None:
    """Raise for what drafts cannot be verified with.

    Args:
        request: what to generate.
        has_assistant: whether a model drafts.
    """
    if has_assistant and request.lookup_tokens:
        given = f"{request.lookup_tokens} beside an assistant"
        raise InvalidInput("prompt_lookup_num_tokens", given, "one source of drafts")
    if request.draft_tokens < 1:
        raise InvalidInput("num_assistant_tokens", request.draft_tokens, "1 or more")
    names = [type(p).__name__ for p in request.processors if isinstance(p, KNOW_THEIR_ROW)]
    if names and len(request.prompts) > 1:
        why = "rows of different lengths reach a processor one by one, and it could not tell which one it has"
        raise Unsupported(f"{', '.join(names)} with drafts for several rows", (why,))


class Assistant:
    """A smaller model, which goes ahead.

    Args:
        decoder: of the smaller model; its rows are emptied.
        request: what to generate.
        main: whose rows these are.

    Raises:
        InvalidInput: it has another vocabulary, batch or device than the main one, or too few slots.
    """

    def __init__(self, decoder: Decoder, request: Request, main: Decoder) -> None:
        ours, theirs = (d.model.config.get_text_config().vocab_size for d in (main, decoder))
        needed = request.width + request.limit - 1 + request.draft_tokens
        if decoder is main:
            raise InvalidInput("assistant", "the Decoder itself", "another one")
        if (ours, main.batch, main.device) != (theirs, decoder.batch, decoder.device):
            got = f"a vocabulary of {theirs}, {decoder.batch} rows, on {decoder.device}"
            raise InvalidInput(
                "assistant", got, f"a vocabulary of {ours}, {main.batch} rows, on {main.device}"
            )
        if decoder.capacity < needed:
            raise InvalidInput("assistant", f"a capacity of {decoder.capacity}", f"{needed} or more")
        self.drafted = request.draft_tokens
        self._decoder, self._request = decoder, request

    def begin(self) -> None:
        """Read the prompts."""
        self._decoder.reset()
        self._decoder.prefill(self._request.prompts)

    def draft(self, rows: Rows, wanted: list[int], ids: Ids | None) -> Drafts:
        """Guess by going ahead; as drawn as the tokens themselves will be.

        Args:
            rows: what they have.
            wanted: tokens to guess for each; 0 for a row that wants none.
            ids: where guesses are written, if anything reads them.
        """
        live, request = [int(count > 0) for count in wanted], self._request
        logits = self._catch_up(rows, live)
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        for ahead in range(self.drafted):
            if ahead:
                logits = self._decoder.step(tokens[-1], counts=live)
            new = [made + ahead for made in rows.made]
            scores = processed_by_row(logits, request, ids, new)[:, 0]
            tokens.append(pick(scores, request))
            if request.sample:
                chances.append(scores.softmax(dim=-1))
            _write(ids, new, tokens[-1])
        return Drafts(
            torch.cat(tokens, dim=1), wanted, torch.stack(chances, dim=1) if request.sample else None
        )

    def _catch_up(self, rows: Rows, live: list[int]) -> Tensor:
        """(batch, 1, vocabulary) logits behind the last tokens, once what was rejected is forgotten."""
        decoder = self._decoder
        held = [min(pair) for pair in zip(decoder.lengths, rows.seen, strict=True)]
        decoder.truncate(held)
        missing = [
            tokens[len(tokens) - (seen + 1 - length) :] if wants else []
            for tokens, seen, length, wants in zip(rows.tokens, rows.seen, held, live, strict=True)
        ]
        counts = [len(tokens) for tokens in missing]
        columns = max(2, *counts)  # one token, or two where all drafts were right: one graph for both
        padded = [token for tokens in missing for token in (*tokens, *[0] * (columns - len(tokens)))]
        steps = upload(padded, decoder.device).view(-1, columns)
        logits = decoder.step(steps, counts=counts)
        last = upload([max(0, count - 1) for count in counts], decoder.device)
        return logits[torch.arange(len(counts), device=decoder.device), last][:, None]


class Lookup:
    """The text itself: what came behind the last tokens when they were there before.

    Args:
        request: how many tokens to guess, and how many to look up.
        device: where guesses go.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.drafted = request.lookup_tokens
        self._request, self._device = request, device

    def begin(self) -> None:
        """Read the prompts."""
        prompts = self._request.prompts
        self._texts = [Text(prompt.tolist(), self._request.lookup_ngram) for prompt in prompts]

    def draft(self, rows: Rows, wanted: list[int], ids: Ids | None) -> Drafts:
        """Guess by looking up.

        Args:
            rows: what they have.
            wanted: tokens to guess for each; 0 for a row that wants none.
            ids: where guesses are written, if anything reads them.
        """
        found = []
        for text, tokens, count in zip(self._texts, rows.tokens, wanted, strict=True):
            text.extend(tokens)
            found.append(text.continuation(count))
        padded = [[*guess, *[0] * (self.drafted - len(guess))] for guess in found]
        guesses = upload([token for guess in padded for token in guess], self._device)
        drafts = Drafts(guesses.view(len(found), -1), [len(guess) for guess in found])
        _write(ids, rows.made, drafts.tokens)
        return drafts


class Text:
    """Tokens, and where each short run of them was last followed by something.

    Args:
        prompt: the tokens that it begins with.
        longest: tokens of a run at most.
    """

    def __init__(self, prompt: list[int], longest: int) -> None:
        self._tokens: list[int] = []
        self._prompt = len(prompt)
        self._longest = longest
        self._follows: dict[tuple[int, ...], int] = {}
        self._append(prompt)

    def extend(self, new: list[int]) -> None:
        """Take in what has come behind the prompt.

        Args:
            new: all new tokens so far; those known already are not looked at.
        """
        self._append(new[len(self._tokens) - self._prompt :])

    def _append(self, tokens: list[int]) -> None:
        for token in tokens:
            here = len(self._tokens)
            for length in range(1, min(self._longest, here) + 1):
                self._follows[tuple(self._tokens[here - length :])] = here
            self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """What came behind the longest run that the text ends with and had before; nothing if it had none.

        Where that reaches the end of the text it goes round, as a text does that repeats itself.

        Args:
            count: tokens to find.
        """
        for length in range(min(self._longest, len(self._tokens)), 0, -1):
            place = self._follows.get(tuple(self._tokens[-length:]))
            if place is not None:
                period = len(self._tokens) - place
                return [self._tokens[place + ahead % period] for ahead in range(count)]
        return []


def _write(ids: Ids | None, new: list[int], tokens: Tensor) -> None:
    """Put guesses behind the new tokens of each row."""
    if ids is not None:
        for row, at in enumerate(new):
            ids.put(at, tokens[row], row)
