"""Merge partial results by their LSE."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Put partial results over disjoint keys together.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v), any floating dtype.
        lses: (splits, batch, heads_q, q_len) fp32, natural log; -inf for a partial that saw nothing, whose
            out then does not count whatever it holds.

    Returns:
        out (batch, q_len, heads_q, head_dim_v) in the dtype of outs, and lse (batch, heads_q, q_len) fp32.
        Empty partials merge to an empty one: out 0, LSE -inf.
    """
    out, lse = combine(outs, lses.transpose(-1, -2))
    return out.to(outs.dtype), lse.transpose(-1, -2).contiguous()


def combine(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The same for outs (splits, ..., head_dim_v) and lses (splits, ...): the sums, not rounded yet."""
    largest = lses.amax(dim=0)
    # Where nobody saw anything there is no finite LSE to be relative to: any will do, as all weigh 0.
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = torch.exp(lses - largest)
    total = weights.sum(dim=0)
    shares = (weights / total.masked_fill(total == 0, 1.0))[..., None]
    return (torch.where(shares > 0, outs, 0.0) * shares).sum(dim=0), largest + total.log()
