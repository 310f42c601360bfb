"""From logits to tokens: the most likely one, a sample, or as many drafted ones as the model agrees with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_decoding.decoder.prompts import Ids
from flash_decoding.decoder.request import Request


@dataclass(frozen=True, eq=False)
class Drafts:
    """Tokens that may come next, guessed cheaply.

    ``tokens`` is (batch, drafted) int64 on the device, of which ``counts[row]`` are meant in each row.
    ``chances``, (batch, drafted, vocabulary) fp32, is what each of them was drawn from; None where it was not
    drawn but picked.
    """

    tokens: Tensor
    counts: list[int]
    chances: Tensor | None = None


def pick(scores: Tensor, request: Request) -> Tensor:
    """The next token of each row: as ``model.generate`` picks or draws it.

    Args:
        scores: (batch, vocabulary) logits, processed.
        request: whether to sample, and with which generator.

    Returns:
        (batch, 1) int64.
    """
    if not request.sample:
        return scores.argmax(dim=-1, keepdim=True)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=request.generator)


def processed(logits: Tensor, request: Request, ids: Ids | None, new: int) -> Tensor:
    """Scores for one token, of rows that have equally many new ones.

    Args:
        logits: (batch, vocabulary), which stay as they are.
        request: its processors.
        ids: tokens so far, if anything reads them.
        new: new tokens of each row so far.

    Returns:
        (batch, vocabulary); fp32 where anything but the largest of them matters.
    """
    if not request.processors:
        return logits.float() if request.sample else logits
    assert ids is not None
    return _process(request, ids.first(new), logits.to(torch.float32, copy=True))


def processed_by_row(logits: Tensor, request: Request, ids: Ids | None, new: list[int]) -> Tensor:
    """Scores for several tokens, of rows that have different numbers of new ones.

    Args:
        logits: (batch, columns, vocabulary), which stay as they are.
        request: its processors, which get row by row and column by column.
        ids: tokens so far, and behind them those that the columns follow.
        new: new tokens of each row, as its first column has them.

    Returns:
        (batch, columns, vocabulary), as :func:`processed`.
    """
    if not request.processors:
        return logits.float() if request.sample else logits
    assert ids is not None
    scores = logits.to(torch.float32, copy=True)
    for row, made in enumerate(new):
        for column in range(logits.shape[1]):
            before = ids.of(row, made + column)
            scores[row, column] = _process(request, before, scores[row : row + 1, column])[0]
    return scores


def _process(request: Request, ids: Tensor, scores: Tensor) -> Tensor:
    processors: Any = request.processors  # typed for classes of tensors that nobody makes
    found: Tensor = processors(ids, scores)
    return found


def verified(scores: Tensor, drafts: Drafts | None, request: Request) -> tuple[Tensor, Tensor]:
    """Keep drafted tokens as far as the model agrees, and add one of its own.

    When sampling, a draft d is kept with probability min(1, p(d) / q(d)), p being the model's and q what it
    was drawn from; the token in place of the first one that is not kept is drawn from max(0, p - q). Tokens
    are then distributed as without drafts. One that was picked counts as drawn with certainty.

    Args:
        scores: (batch, drafted + 1, vocabulary), processed: behind the last token and behind each draft.
        drafts: what to verify; None for nothing.
        request: whether to sample, and with which generator.

    Returns:
        (batch, drafted + 1) tokens, of which those kept and the one behind them count; (batch,) how many are
        kept.
    """
    if drafts is None:
        tokens = pick(scores[:, 0], request)
        return tokens, torch.zeros_like(tokens[:, 0])
    device, drafted = scores.device, drafts.tokens.shape[1]
    meant = torch.arange(drafted, device=device) < torch.tensor(drafts.counts, device=device)[:, None]
    if not request.sample:
        tokens = scores.argmax(dim=-1)
        return tokens, _leading(meant & (tokens[:, :-1] == drafts.tokens))
    p = scores.softmax(dim=-1)
    q = torch.zeros_like(p)  # behind the last draft nothing was drawn
    if drafts.chances is None:
        q[:, :-1].scatter_(2, drafts.tokens[..., None], 1.0)
    else:
        q[:, :-1] = drafts.chances
    q[:, :-1] *= meant[..., None]
    place = drafts.tokens[..., None]
    ratio = (p[:, :-1].gather(2, place) / q[:, :-1].gather(2, place))[..., 0]
    dice = torch.rand(ratio.shape, device=device, generator=request.generator)
    kept = _leading(meant & (dice < ratio))
    rows = torch.arange(len(kept), device=device)
    left = (p[rows, kept] - q[rows, kept]).clamp_(min=0)
    # Where p and q are equal but for rounding, nothing may be left: any token of p will do then.
    left = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p[rows, kept])
    tokens = torch.cat((drafts.tokens, drafts.tokens[:, -1:]), dim=1)
    return tokens.scatter_(1, kept[:, None], torch.multinomial(left, 1, generator=request.generator)), kept


def _leading(agrees: Tensor) -> Tensor:
    """(batch,) how many are true before the first that is not."""
    return agrees.long().cumprod(dim=1).sum(dim=1)
