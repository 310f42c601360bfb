"""The online softmax: what is kept per row while its keys pass by, chunk after chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Running state of rows; ``total`` and ``weighted`` are relative to ``exp(largest)``.

    Everything is packed and ordered: (outer, inner, rows, ...), where outer and inner count runs and heads.
    """

    largest: Tensor
    """(outer, inner, rows, 1): the largest score so far; -inf before the first."""
    total: Tensor
    """(outer, inner, rows, 1): the sum of exp(score - largest)."""
    weighted: Tensor
    """(outer, inner, rows, head_dim_v): the sum of exp(score - largest) * value."""

    @classmethod
    def empty(cls, q: Tensor, head_dim_v: int) -> Softmax:
        """The state before any key, for the rows of q (outer, inner, rows, head_dim)."""
        rows = q.shape[:3]
        return cls(q.new_full((*rows, 1), -math.inf), q.new_zeros(*rows, 1), q.new_zeros(*rows, head_dim_v))

    def rows(self, rows: slice) -> Softmax:
        """A view of some rows; updating it updates this state."""
        return Softmax(*(part[:, :, rows] for part in (self.largest, self.total, self.weighted)))

    def update(self, scores: Tensor, values: Tensor) -> None:
        """Take in scores (outer, inner, rows, keys), overwritten, and values (..., keys, head_dim_v)."""
        largest = torch.maximum(self.largest, scores.amax(dim=-1, keepdim=True))
        # A row that saw nothing yet has no finite score to be relative to: any will do, as all weigh 0.
        base = largest.masked_fill(largest == -math.inf, 0.0)
        kept = self.largest.sub(base).exp_()
        weights = scores.sub_(base).exp_()
        self.total.mul_(kept).add_(weights.sum(dim=-1, keepdim=True))
        self.weighted.mul_(kept)
        for i, weighted in enumerate(self.weighted):
            weighted.baddbmm_(weights[i], values[i])
        self.largest.copy_(largest)

    def add_sink(self, sinks: Tensor) -> None:
        """Take in one more key per row, of score (outer, inner, rows, 1) and without a value."""
        largest = torch.maximum(self.largest, sinks)
        kept = self.largest.sub(largest).exp_()
        self.total.mul_(kept).add_(sinks.sub(largest).exp_())
        self.weighted.mul_(kept)
        self.largest.copy_(largest)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Output (outer, inner, rows, head_dim_v) and LSE (outer, inner, rows, 1); 0 and -inf where empty."""
        out = self.weighted / self.total.masked_fill(self.total == 0, 1.0)
        return out, self.largest + self.total.log()
