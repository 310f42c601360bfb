"""The gate: nothing is timed before its result agrees with the reference on the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.bench.cases import Case, Inputs
from flash_decoding.bench.column import Role
from flash_decoding.spec import Options

CHECKED_TOKENS = 131072
"""Keys that the reference looks at per row: enough for every row of the announcement on the whole."""


@dataclass(frozen=True)
class Verdict:
    """How far a result lies from the reference, and how far it may."""

    error: float
    budget: float
    complaint: str = ""
    """What is wrong beyond the distance (shape, dtype, NaN), or nothing."""

    @property
    def passed(self) -> bool:
        return not self.complaint and self.error <= self.budget


@dataclass(frozen=True, eq=False)
class Truth:
    """The right answer of one input set, for the sequences that are compared."""

    case: Case
    inputs: Inputs
    rows: Tensor
    out: Tensor
    """(rows, q_len, heads_q, head_dim) float64."""
    budget: float

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Truth:
        """Evaluate the reference in float64 on sequences spread evenly over the batch.

        The budget is twice what the same mathematics loses in plain PyTorch of the case's dtype (another
        order of the same roundings may lose as much again), plus one unit in the last place of the largest
        output, for the rounding of the result itself.
        """
        count = max(1, min(case.batch, CHECKED_TOKENS // case.kv_len))
        rows = torch.linspace(0, case.batch - 1, count).round().long().to(case.device)
        queries, cache = inputs.sequences(rows)
        options = Options.make(head_dim=case.head_dim, causal=True)
        out, _ = reference.attend(queries, cache, options, dtype=torch.float64)
        lost = (_in_case_dtype(case, queries.q, cache.k, cache.v).double() - out).abs().max()
        rounding = torch.finfo(case.dtype).eps * out.abs().max()
        return cls(case, inputs, rows, out, float(2 * lost + rounding))

    def judge(self, role: Role, result: Tensor) -> Verdict:
        """Compare what a column of this role returned for the same input set."""
        return self._judge_read(result) if role == "floor" else self._judge_attention(result)

    def _judge_attention(self, result: Tensor) -> Verdict:
        q = self.inputs.q
        complaint = ""
        if result.dtype != q.dtype or result.numel() != q.numel():
            complaint = f"returned {result.dtype} {tuple(result.shape)} for {q.dtype} {tuple(q.shape)}"
        elif not bool(torch.isfinite(result).all()):
            complaint = "returned NaN or infinity"
        if complaint:
            return Verdict(math.inf, self.budget, complaint)
        got = result.reshape(q.shape)[self.rows].double()
        return Verdict(float((got - self.out).abs().max()), self.budget)

    def _judge_read(self, result: Tensor) -> Verdict:
        """A read is right when its sums add up, in the wrapping arithmetic of its word size, to all words."""
        words = [x.view(result.dtype).sum(dtype=result.dtype) for x in (self.inputs.k, self.inputs.v)]
        differs = int(result.sum(dtype=result.dtype)) != int(words[0] + words[1])
        return Verdict(float(differs), 0.0, "the words read add up to something else" if differs else "")


def _in_case_dtype(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of full caches with every intermediate rounded to the dtype of its inputs (q_len 1)."""
    grouped = q.view(-1, case.heads_kv, case.group, case.head_dim)
    scores = grouped @ k.permute(0, 2, 3, 1) * case.scale
    weights = torch.softmax(scores, dim=-1)
    return (weights @ v.transpose(1, 2)).flatten(1, 2).unsqueeze(1)
