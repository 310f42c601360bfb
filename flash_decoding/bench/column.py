"""A column of the table: what it measures, where it cannot, and how the attention suite makes its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flash_decoding.bench.cases import Case
from flash_decoding.bench.inputs import Inputs

Role = Literal["ours", "peer", "floor"]
Call = Callable[[], Tensor]
WhyNot = Callable[[Case], "str | None"]
"""Reason why a case is not run, or None."""


def anywhere(case: Case) -> str | None:
    """The ``why_not`` of a column that runs everything."""
    return None


@dataclass(frozen=True)
class Way:
    """One way to make a column's call. Where a column has several, the fastest of each row counts."""

    label: str
    prepare: Callable[[Case, Inputs], Call]
    """Does all that may stay outside the timing, and returns the call that is timed."""


@dataclass(frozen=True)
class Heading:
    """What every suite's table knows of a column."""

    name: str
    about: str
    """What exactly is timed, for the legend under the table."""
    role: Role
    """The floor is what no column can beat; ours are compared with it."""


@dataclass(frozen=True)
class Column(Heading):
    """One contender. Add one by writing such a record and naming it in ``baselines/__init__.py``.

    A call of role ``ours`` or ``peer`` returns the attention output, (batch, q_len, heads_q, head_dim) or a
    view of that many elements in that order; of role ``floor`` it returns sums of the words that it read.
    """

    ways: tuple[Way, ...]
    why_not: WhyNot = anywhere
    """Reason why the column does not run a case, or None."""

    @classmethod
    def simple(
        cls,
        name: str,
        about: str,
        prepare: Callable[[Case, Inputs], Call],
        *,
        role: Role = "peer",
        why_not: WhyNot = anywhere,
    ) -> Column:
        """A column with one way to make its call."""
        return cls(name, about, role, (Way(name, prepare),), why_not)
