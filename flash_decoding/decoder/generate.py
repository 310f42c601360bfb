"""The loop of generation: the device works on the next tokens while the host looks at the last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.cache.ledger import upload
from flash_decoding.decoder.prefill import Progress
from flash_decoding.decoder.prompts import Ids
from flash_decoding.decoder.request import Request
from flash_decoding.decoder.rows import OnTokens, Readback, Rows
from flash_decoding.decoder.sampling import pick, processed
from flash_decoding.errors import CacheFull, InvalidInput

if TYPE_CHECKING:
    from flash_decoding.decoder.decoder import Decoder


def check_room(decoder: Decoder, request: Request) -> None:
    """Raise unless the decoder has a row for each prompt, and slots for all that may come.

    Args:
        decoder: whose rows they are.
        request: prompts, and how many new tokens.
    """
    if len(request.prompts) != decoder.batch:
        raise InvalidInput("prompts", f"{len(request.prompts)} of them", f"{decoder.batch}, one a row")
    for row, prompt in enumerate(request.prompts):
        free = decoder.capacity - prompt.shape[0] + 1  # the last token is never looked back at
        if request.limit > free:
            what = f"tokens behind the prompt of row {row}"
            raise CacheFull("max_new_tokens", request.limit, max(0, free), what)


def generate(
    decoder: Decoder, request: Request, on_tokens: OnTokens | None, progress: Progress | None
) -> list[list[int]]:
    """Token by token. The step behind a token is queued before the host knows which token it is.

    Args:
        decoder: with empty rows.
        request: what to generate.
        on_tokens: told after each step.
        progress: of the prompts.

    Returns:
        New tokens of each row.
    """
    rows, readback = Rows(request), Readback(decoder.device)
    chooser = Chooser(request, decoder.device)
    logits = decoder.prefill(request.prompts, progress=progress)
    for made in range(1, request.limit + 1):
        tokens = chooser.next(logits, rows.over)
        readback.send(chooser.with_stops(tokens))
        if made < request.limit:
            logits = decoder.step(tokens, counts=[int(not over) for over in rows.over])[:, 0]
        told: list[list[int]] = []
        for row, (token, *stops) in enumerate(readback.receive()):
            live = not rows.over[row]
            if live:
                rows.add(row, token, any(stops))
            told.append([token] if live else [])
        stopped = on_tokens is not None and on_tokens(told) is False
        if stopped or all(rows.over):
            break
    # The queued step has seen the last token of rows that ended early: forget it.
    decoder.truncate(rows.seen)
    return rows.tokens


class Chooser:
    """The next tokens, and whether a criterion stops at them, with the device's copy of all tokens so far.

    Args:
        request: processors and criteria.
        device: where they compute.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self._request, self._new = request, 0
        self._ids = Ids(request.prompts, request.limit, request.pad, device) if request.reads_ids else None
        self._over = [False] * len(request.prompts)
        self._over_on_device = torch.zeros(len(request.prompts), 1, dtype=torch.bool, device=device)

    def next(self, logits: Tensor, over: list[bool]) -> Tensor:
        """(batch, 1) int64, on the device.

        Args:
            logits: (batch, vocabulary).
            over: rows that have ended; where anything reads their tokens, these are padding from now on.
        """
        request, ids = self._request, self._ids
        tokens = pick(processed(logits, request, ids, self._new), request)
        if ids is not None:
            if over != self._over:
                self._over = list(over)
                self._over_on_device.copy_(upload(over, tokens.device)[:, None])
            tokens = tokens.masked_fill(self._over_on_device, request.pad)
            ids.put(self._new, tokens)
        self._new += 1
        return tokens

    def with_stops(self, tokens: Tensor) -> Tensor:
        """(batch, 1) tokens, or (batch, 2) with what the criteria say beside each.

        Args:
            tokens: (batch, 1), those of the last call.
        """
        if self._ids is None or not self._request.criteria:
            return tokens
        stops = self._request.criteria(self._ids.first(self._new), None)
        return torch.cat((tokens, stops[:, None].to(tokens.dtype)), dim=1)
