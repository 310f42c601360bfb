"""How sequences, heads and query tokens lie in the products: query heads that share keys become rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Of a group of runs. *Packed* tensors are (outer, inner, rows or keys, elements).

    Neither keys nor values can be one batch over both runs and heads: that would take one stride for both,
    thus a copy. So products are batched over one of them (inner), in a loop over the other: the shorter one.
    """

    runs: int
    heads: int
    group: int
    """Query heads that share a key/value head."""

    @property
    def runs_first(self) -> bool:
        return self.runs <= self.heads

    def rows(self, x: Tensor) -> Tensor:
        """Pack (runs, q_len, heads_q, elements); the rows of a token stay together."""
        q_len, elements = x.shape[1], x.shape[3]
        split = x.reshape(self.runs, q_len, self.heads, self.group, elements)
        split = split.permute((0, 2, 1, 3, 4) if self.runs_first else (2, 0, 1, 3, 4))
        return split.reshape(*split.shape[:2], q_len * self.group, elements)

    def tokens(self, packed: Tensor) -> Tensor:
        """The way back: (runs, q_len, heads_q, elements)."""
        split = self.by_run(packed)
        split = split.reshape(self.runs, self.heads, -1, self.group, packed.shape[3])
        return split.transpose(1, 2).flatten(2, 3)

    def cached(self, x: Tensor) -> Tensor:
        """View (runs, keys, heads, elements) as packed."""
        return x.permute((0, 2, 1, 3) if self.runs_first else (2, 0, 1, 3))

    def by_run(self, packed: Tensor) -> Tensor:
        """View packed as (runs, heads, ...)."""
        return packed if self.runs_first else packed.transpose(0, 1)
