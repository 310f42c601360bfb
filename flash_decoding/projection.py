"""Vocabulary of the linear layers of a decode step, as :mod:`flash_decoding.spec` is of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square normalisation: ``x / sqrt(mean(x^2) + eps) * (weight + offset)``."""

    weight: Tensor
    """(columns,)."""
    eps: float
    offset: float = 0.0
    """1 where a model stores its weights relative to one, as Gemma does."""


@dataclass(frozen=True, eq=False)
class Projection:
    """Linear layers over one input, with what comes before and after them::

        x = norm(x)                                        if there is a norm
        y = x W^T + b, for each weight, side by side
        y = activation(y_0) * y_1                          if gated, which takes two weights of one shape
        y = y + residual                                   if the call has one

    Reading the weights is all that a decode step spends time on; so the rest is done on the way.
    """

    weights: tuple[Tensor, ...]
    """Each (rows, columns), contiguous; up to three."""
    biases: tuple[Tensor | None, ...] = ()
    """One for each weight, (rows,); none at all where empty."""
    norm: Norm | None = None
    gated: Activation | None = None

    @property
    def columns(self) -> int:
        """Elements of an input vector."""
        return self.weights[0].shape[1]

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows of the output, weight by weight; a gated pair gives those of one."""
        heights = tuple(weight.shape[0] for weight in self.weights)
        return heights[:1] if self.gated else heights

    @property
    def rows(self) -> int:
        """Elements of an output vector."""
        return sum(self.heights)


@dataclass(frozen=True)
class LinearTile:
    """How the linear kernel goes over a weight."""

    step: int
    """Rows of a weight that a program takes; up to ``block_n``, which is what the matrix units take."""
    block_n: int
    block_k: int
    """Columns of a step of the pipeline."""
    num_warps: int
    num_stages: int
    prefetch: int = 512
    """Bytes of each row that a program asks for before it waits for the kernel before."""
