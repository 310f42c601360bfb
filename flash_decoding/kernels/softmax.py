"""The online-softmax algebra, written once for every kernel.

A state is ``(m, l, acc)`` for some rows: ``m`` the largest score so far in base 2, ``l`` the sum of
``2 ** (score - m)``, ``acc`` the sum of ``2 ** (score - m) * v``. Scores come in base 2 (times log2 e), as the
hardware's exponential is. The neutral element has ``m = -inf``; nothing here turns it into a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def empty(ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tuple:
    """State of rows that have seen no key."""
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    return m, l, acc


@triton.jit
def _pivot(m: tl.tensor) -> tl.tensor:
    """What to subtract before the exponential: m, but 0 where m is -inf, since -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def update(m: tl.tensor, l: tl.tensor, acc: tl.tensor, scores_log2: tl.tensor, v: tl.tensor) -> tl.tuple:
    """Take one tile of keys in: scores (rows, keys) in base 2, v (keys, columns)."""
    m_new = tl.maximum(m, tl.max(scores_log2, 1))
    pivot = _pivot(m_new)
    alpha = tl.exp2(m - pivot)
    p = tl.exp2(scores_log2 - pivot[:, None])
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def from_partials(lse: tl.tensor, out: tl.tensor) -> tl.tuple:
    """State of one row whose keys were seen by several programs: lse (parts,), out (parts, columns)."""
    lse_log2 = lse * LOG2E
    m = tl.max(lse_log2, 0)
    weight = tl.exp2(lse_log2 - _pivot(m))
    return m, tl.sum(weight, 0), tl.sum(weight[:, None] * out, 0)


@triton.jit
def merge(
    m: tl.tensor, l: tl.tensor, acc: tl.tensor, m_other: tl.tensor, l_other: tl.tensor, acc_other: tl.tensor
) -> tl.tuple:
    """State of one row that has seen the keys of two states."""
    m_new = tl.maximum(m, m_other)
    pivot = _pivot(m_new)
    alpha = tl.exp2(m - pivot)
    beta = tl.exp2(m_other - pivot)
    return m_new, l * alpha + l_other * beta, acc * alpha + acc_other * beta


@triton.jit
def denominator(l: tl.tensor) -> tl.tensor:
    """l, but 1 for an empty state, whose output is to be 0."""
    return tl.where(l == 0.0, 1.0, l)


@triton.jit
def log_sum_exp(m: tl.tensor, l: tl.tensor) -> tl.tensor:
    """Natural log-sum-exp of a state; -inf for an empty one."""
    return tl.where(l == 0.0, float("-inf"), (m + tl.log2(denominator(l))) * LN2)
