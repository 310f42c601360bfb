"""The rows of the model suite: what the cache of a step holds, and the bytes that the step has to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput

RAGGED_FROM = 8
"""Ragged lengths start at the context divided by this."""


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """One row: greedy steps, the last of which attends to ``lengths`` keys."""

    context: int
    """Keys of the longest sequence, and slots of every cache."""
    lengths: tuple[int, ...]
    """Keys of each sequence in the last step of a burst, that of its newest token included."""
    burst: int
    """Steps made in a row and timed as a whole."""
    layers: int
    heads_kv: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.context}"

    @property
    def is_ragged(self) -> bool:
        return min(self.lengths) < self.context

    @property
    def filled(self) -> tuple[int, ...]:
        """Keys of each sequence before a burst."""
        return tuple(length - self.burst for length in self.lengths)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live keys and values of all layers, each read once in the last step of a burst."""
        per_token = 2 * self.heads_kv * self.head_dim * self.dtype.itemsize * self.layers
        return sum(self.lengths) * per_token

    def keys_and_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """What fills the cache of a layer before a burst: the same for every column.

        Returns:
            Keys and values, (batch, longest, heads_kv, head_dim) each; what lies beyond a sequence's own
            length is not to be used.
        """
        generator = torch.Generator(self.device).manual_seed(layer)
        shape = (2, self.batch, max(self.filled), self.heads_kv, self.head_dim)
        drawn = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return drawn[0], drawn[1]

    def with_lengths(self, lengths: Sequence[int]) -> ModelCase:
        """The same with other sequences in caches of the same size."""
        return replace(self, lengths=tuple(lengths))

    def with_layers(self, layers: int) -> ModelCase:
        """The same of a model with other layers."""
        return replace(self, layers=layers)


def lengths_of(batch: int, context: int, *, ragged: bool) -> tuple[int, ...]:
    """All the same, or spread evenly from an eighth of the context to all of it.

    Raises:
        InvalidInput: one sequence cannot be ragged.
    """
    if not ragged:
        return (context,) * batch
    if batch == 1:
        raise InvalidInput("batch", 1, "2 or more where --ragged asks for several lengths")
    return spread(context // RAGGED_FROM, context, batch)


def spread(first: int, last: int, count: int) -> tuple[int, ...]:
    """So many whole numbers from first to last, as far apart as each other."""
    return tuple(round(first + (last - first) * i / (count - 1)) for i in range(count))
