"""The loop of generation with drafts: guessed cheaply, verified together in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.cache.ledger import upload
from flash_decoding.decoder.drafts import Drafter
from flash_decoding.decoder.prefill import Progress
from flash_decoding.decoder.prompts import Ids
from flash_decoding.decoder.request import Request
from flash_decoding.decoder.rows import OnTokens, Readback, Rows
from flash_decoding.decoder.sampling import Drafts, processed_by_row, verified

if TYPE_CHECKING:
    from flash_decoding.decoder.decoder import Decoder


def speculate(
    decoder: Decoder,
    request: Request,
    drafter: Drafter,
    *,
    on_tokens: OnTokens | None,
    progress: Progress | None,
) -> list[list[int]]:
    """Round by round: draft, verify, keep what the model agrees with, forget the rest.

    A step takes one token, or all that the drafter may draft and one more: so there are two graphs.

    Args:
        decoder: with empty rows.
        request: what to generate.
        drafter: what guesses.
        on_tokens: told after each round.
        progress: of the prompts.

    Returns:
        New tokens of each row.
    """
    rows, readback = Rows(request), Readback(decoder.device)
    room = request.limit + drafter.drafted
    ids = Ids(request.prompts, room, request.pad, decoder.device) if request.reads_ids else None
    logits = decoder.prefill(request.prompts, progress=progress)[:, None]
    drafter.begin()
    drafts: Drafts | None = None
    while True:
        scores = processed_by_row(logits, request, ids, rows.made)
        tokens, kept = verified(scores, drafts, request)
        readback.send(torch.cat((kept[:, None], tokens), dim=1))
        told = [_take(rows, row, got, request, ids) for row, got in enumerate(readback.receive())]
        stopped = on_tokens is not None and on_tokens(told) is False
        decoder.truncate(rows.seen)
        if stopped or all(rows.over):
            return rows.tokens
        drafts = drafter.draft(rows, wanted, ids) if any(wanted := _wanted(decoder, rows, drafter)) else None
        if drafts is not None and not any(drafts.counts):
            drafts = None
        logits = _verify(decoder, rows, drafts)


def _take(rows: Rows, row: int, got: list[int], request: Request, ids: Ids | None) -> list[int]:
    """Give a row the tokens that are kept and the one behind them, up to where it ends."""
    if rows.over[row]:
        return []
    kept, tokens = got[0], got[1:]
    made = rows.made[row]
    tokens = tokens[: kept + 1]
    if ids is not None:
        ids.put(made, torch.tensor(tokens), row)
    for count, token in enumerate(tokens, start=1):
        stops = bool(
            ids is not None and request.criteria and request.criteria(ids.of(row, made + count), None)
        )
        rows.add(row, token, stops)
        if rows.over[row]:
            return tokens[:count]
    return tokens


def _wanted(decoder: Decoder, rows: Rows, drafter: Drafter) -> list[int]:
    """Drafts for each row: as many as it may still get, and none where a step of them has no slots."""
    live = [row for row, over in enumerate(rows.over) if not over]
    free = min(decoder.capacity - rows.seen[row] for row in live)
    if free < drafter.drafted + 1:
        return [0] * decoder.batch
    return [0 if over else min(drafter.drafted, rows.left(row) - 1) for row, over in enumerate(rows.over)]


def _verify(decoder: Decoder, rows: Rows, drafts: Drafts | None) -> Tensor:
    """Logits behind the last token of each row, and behind each of its drafts."""
    last = upload([tokens[-1] for tokens in rows.tokens], decoder.device)[:, None]
    live = [int(not over) for over in rows.over]
    if drafts is None:
        return decoder.step(last, counts=live)
    counts = [one * (1 + drafted) for one, drafted in zip(live, drafts.counts, strict=True)]
    return decoder.step(torch.cat((last, drafts.tokens), dim=1), counts=counts)
