"""The gate of the model suite: a column's logits on a small slice of the model, against eager in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.bench.check import Verdict
from flash_decoding.bench.models.case import ModelCase, spread
from flash_decoding.bench.models.column import ModelColumn, Prepare, Stepper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 4096
"""Slots of the checked caches: enough for a few splits."""

SHORTEST = 64
"""Keys of the shortest checked sequence, where a lost one shows the most."""

STEPS = 3
"""Tokens fed one by one, then once more after a rewind."""


def checked_cases(like: ModelCase) -> list[ModelCase]:
    """What a column is checked on: the same batch with ragged lengths, or one short and one long sequence."""
    base = ModelCase(
        context=CONTEXT,
        lengths=(CONTEXT,) * like.batch,
        burst=STEPS,
        layers=like.layers,
        heads_kv=like.heads_kv,
        head_dim=like.head_dim,
        dtype=like.dtype,
        device=like.device,
    )
    if like.batch == 1:
        return [base, base.with_lengths([SHORTEST])]
    return [base.with_lengths(spread(SHORTEST, CONTEXT, like.batch))]


@dataclass(frozen=True, eq=False)
class Truth:
    """The right logits of one case."""

    model: PreTrainedModel
    """In the dtype that is measured."""
    case: ModelCase
    tokens: Tensor
    """(STEPS, batch, 1): the same for everybody, since a greedy choice may hang on a rounding."""
    logits: Tensor
    """(STEPS, batch, 1, vocabulary) float64."""
    budget: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, case: ModelCase, eager: Prepare) -> Truth:
        """Evaluate eager attention in float64, on the same weights, keys and values.

        The budget is twice what eager loses in the model's dtype (another order of the same roundings may
        lose as much again), plus one unit in the last place of the largest logit, for its own rounding.
        Transformers computes norms and rotary angles in float32 whatever the dtype, for every column alike.
        """
        generator = torch.Generator(case.device).manual_seed(0)
        shape = (STEPS, case.batch, 1)
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary, shape, generator=generator, device=case.device)
        exact = _feed(eager(copy.deepcopy(model).double(), case), tokens)
        lost = (_feed(eager(model, case), tokens).double() - exact).abs().max()
        rounding = torch.finfo(case.dtype).eps * exact.abs().max()
        return cls(model, case, tokens, exact, float(2 * lost + rounding))

    @torch.no_grad()
    def judge(self, column: ModelColumn) -> Verdict:
        """Feed the tokens, rewind, and feed them again; the worse of both passes counts."""
        assert column.prepare is not None, "a bound has no logits"
        stepper = column.prepare(self.model, self.case)
        try:
            first = self._compare(_feed(stepper, self.tokens))
            stepper.rewind()
            second = self._compare(_feed(stepper, self.tokens))
        finally:
            stepper.close()
        return worse(first, second)

    def _compare(self, logits: Tensor) -> Verdict:
        complaint = ""
        if logits.shape != self.logits.shape:
            complaint = f"returned {tuple(logits.shape[1:])} for {tuple(self.logits.shape[1:])}"
        elif not bool(torch.isfinite(logits).all()):
            complaint = "returned NaN or infinity"
        if complaint:
            return Verdict(math.inf, self.budget, complaint)
        return Verdict(float((logits.double() - self.logits).abs().max()), self.budget)


def worse(first: Verdict, second: Verdict) -> Verdict:
    """The one that says more against a column."""
    return max(first, second, key=lambda verdict: (not verdict.passed, verdict.error / verdict.budget))


def _feed(stepper: Stepper, tokens: Tensor) -> Tensor:
    return torch.stack([stepper.step(step).clone() for step in tokens])
