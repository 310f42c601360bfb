"""A column of the model suite: a way to make greedy steps with a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from flash_decoding.bench.column import Heading
from flash_decoding.bench.models.case import ModelCase

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stepper(Protocol):
    """A model behind a filled cache."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence, (batch, 1) int64; logits (batch, 1, vocabulary) for the next."""

    def rewind(self) -> None:
        """Forget the steps made: the cache holds what it was filled with."""

    def close(self) -> None:
        """Leave nothing behind outside of this object."""


Prepare = Callable[["PreTrainedModel", ModelCase], Stepper]


def anywhere(case: ModelCase) -> str | None:
    """The ``why_not`` of a column that runs everything."""
    return None


@dataclass(frozen=True)
class ModelColumn(Heading):
    """One contender, or with role ``floor`` the bound, which is computed and has nothing to prepare."""

    prepare: Prepare | None = None
    why_not: Callable[[ModelCase], str | None] = anywhere
    """Reason why the column does not run a case, or None."""
    compiles: bool = False
    """It takes minutes to get ready for each context."""
