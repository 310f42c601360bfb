"""How sequences, heads and query tokens lie in the products: query heads that share keys become rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Of a group of runs. *Packed* tensors are (runs, heads_kv, rows or keys, elements)."""

    runs: int
    heads: int
    """Key/value heads."""
    group: int
    """Query heads that share one."""

    def rows(self, x: Tensor) -> Tensor:
        """Pack (runs, q_len, heads_q, elements); the rows of a token stay together."""
        split = x.reshape(*x.shape[:2], self.heads, self.group, x.shape[3]).transpose(1, 2)
        return split.reshape(self.runs, self.heads, x.shape[1] * self.group, x.shape[3])

    def tokens(self, packed: Tensor) -> Tensor:
        """The way back: (runs, q_len, heads_q, elements)."""
        split = packed.reshape(self.runs, self.heads, -1, self.group, packed.shape[3])
        return split.transpose(1, 2).flatten(2, 3)

    def ordered(self, packed: Tensor) -> Tensor:
        """Swap runs and heads if runs are more; doing it twice undoes it.

        Neither keys nor values can be one batch over both: that would take one stride for both, thus a copy.
        So products are batched over the second dimension, in a loop over the first: the shorter one.
        """
        return packed if self.runs <= self.heads else packed.transpose(0, 1)
