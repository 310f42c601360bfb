"""The gate: nothing is timed before its result agrees with the reference on the same inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Role
from flash_decoding.bench.inputs import Inputs

CHECKED_TOKENS = 1 << 19
"""Keys that the reference looks at per row of the table, at most, unless one sequence alone has more."""


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
    """Error that is allowed, as a share of the largest output of the same sequence."""

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Truth:
        """Evaluate the reference in float64, sequence by sequence: memory is needed for one at a time.

        All sequences are compared, or where that were too many some that are spread evenly over the batch.

        The budget is twice what the same mathematics loses in plain PyTorch of the case's dtype (another
        order of the same roundings may lose as much again), plus one unit in the last place of the largest
        output, for the rounding of the result itself. Outputs of long sequences are small, those of short
        ones large: each is measured by its own.
        """
        count = max(1, min(case.batch, CHECKED_TOKENS * case.batch // sum(case.live)))
        rows = torch.linspace(0, case.batch - 1, count).round().long()
        outs = [reference.attend(*inputs.sequence(b), case.options)[0][0] for b in rows.tolist()]
        out = torch.stack(outs)
        rounded = torch.stack([_in_case_dtype(case, inputs, b) for b in rows.tolist()])
        lost = (_largest(rounded.double() - out) / _largest(out)).max()
        return cls(case, inputs, rows.to(case.device), out, float(2 * lost + torch.finfo(case.dtype).eps))

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
            return Verdict(math.inf, self.budget * float(_largest(self.out).max()), complaint)
        scale = _largest(self.out)
        error = _largest(result.reshape(q.shape)[self.rows].double() - self.out)
        worst = int((error / scale).argmax())
        return Verdict(float(error[worst]), self.budget * float(scale[worst]))

    def _judge_read(self, result: Tensor) -> Verdict:
        """A read is right when its sums add up, in the wrapping arithmetic of its word size, to all words."""
        total = torch.zeros((), dtype=result.dtype, device=result.device)
        for b in range(self.case.batch):
            for x in self.inputs.seen(self.case, b):
                total += x.view(result.dtype).sum(dtype=result.dtype)
        differs = int(result.sum(dtype=result.dtype)) != int(total)
        return Verdict(float(differs), 0.0, "the words read add up to something else" if differs else "")


def _largest(x: Tensor) -> Tensor:
    """(rows,): the largest magnitude of each sequence."""
    return x.abs().flatten(1).amax(1)


def _in_case_dtype(case: Case, inputs: Inputs, b: int) -> Tensor:
    """One sequence, (q_len, heads_q, head_dim), every intermediate rounded to the dtype of its inputs."""
    start, stop = case.visible[b]
    k, v = (x.transpose(0, 1) for x in inputs.seen(case, b))
    grouped = inputs.q[b].view(case.q_len, case.heads_kv, case.group, case.head_dim).permute(1, 2, 0, 3)
    scores = grouped.flatten(1, 2) @ k.transpose(1, 2) * case.scale
    scores = scores.masked_fill(~case.sees(start, stop).repeat(case.group, 1), -math.inf)
    out = torch.softmax(scores, dim=-1) @ v
    return out.view(case.heads_kv, case.group, case.q_len, -1).permute(2, 0, 1, 3).flatten(1, 2)
