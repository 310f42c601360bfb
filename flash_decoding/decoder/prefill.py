"""Prompts into a cache, in chunks: what is held at once does not grow with their length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flash_decoding.decoder.forward import by_model
from flash_decoding.transformers.cache import FlashCache

Progress = Callable[[int, int], None]
"""Called with tokens done, and tokens in all."""


@dataclass(frozen=True)
class Chunk:
    """Some columns of the prompts that are not over yet."""

    rows: list[int]
    first: list[int]
    """For each row, the token of its prompt that the chunk begins with."""
    counts: list[int]
    """For each row, tokens of its own; padding fills the other columns."""

    @property
    def columns(self) -> int:
        return max(self.counts)


def chunks(lengths: Sequence[int], budget: int, room: Sequence[int]) -> Iterator[Chunk]:
    """Cut prompts into chunks of at most ``budget`` tokens, padding included.

    Rows go side by side until their prompt ends. Padding takes slots while it is there, so no chunk is wider
    than the room that the fullest row has left.

    Args:
        lengths: tokens of each prompt.
        budget: tokens of a chunk; a row has one at least.
        room: slots that each row has free, at least as many as its prompt has tokens.
    """
    done = [0] * len(lengths)
    while rows := [row for row, length in enumerate(lengths) if done[row] < length]:
        left = [lengths[row] - done[row] for row in rows]
        width = min(max(1, budget // len(rows)), max(left), *(room[row] - done[row] for row in rows))
        counts = [min(tokens, width) for tokens in left]
        yield Chunk(rows, [done[row] for row in rows], counts)
        for row, count in zip(rows, counts, strict=True):
            done[row] += count


def prefill(
    model: PreTrainedModel,
    cache: FlashCache,
    prompts: Sequence[Tensor],
    *,
    budget: int,
    progress: Progress | None = None,
) -> Tensor:
    """Append a prompt to each row.

    Args:
        model: whose cache it is.
        cache: with room for all of them.
        prompts: one for each row, (tokens,) int64, on any device.
        budget: tokens of a chunk.
        progress: told after each chunk.

    Returns:
        (batch, vocabulary) logits behind the last token of each.
    """
    lengths = [prompt.shape[0] for prompt in prompts]
    room = [cache.capacity - length for length in cache.lengths]
    last: list[Tensor | None] = [None] * len(prompts)
    done = 0
    for chunk in chunks(lengths, budget, room):
        tokens = _padded(prompts, chunk, model.device)
        ends = sorted(set(chunk.counts))  # columns that are some row's last one in this chunk
        with cache.step(chunk.counts, rows=chunk.rows, q_len=chunk.columns):
            keep = torch.tensor(ends, device=model.device) - 1
            logits = by_model(model, cache, tokens, keep=keep)
        for index, (row, count) in enumerate(zip(chunk.rows, chunk.counts, strict=True)):
            last[row] = logits[index, ends.index(count)]
        done += sum(chunk.counts)
        if progress is not None:
            progress(done, sum(lengths))
    return torch.stack([row for row in last if row is not None])


def _padded(prompts: Sequence[Tensor], chunk: Chunk, device: torch.device) -> Tensor:
    """(rows, columns) tokens of a chunk, padded on the right with token 0."""
    tokens = torch.zeros(len(chunk.rows), chunk.columns, dtype=torch.int64)
    for index, (row, first, count) in enumerate(zip(chunk.rows, chunk.first, chunk.counts, strict=True)):
        tokens[index, :count] = prompts[row][first : first + count]
    return tokens.to(device)
