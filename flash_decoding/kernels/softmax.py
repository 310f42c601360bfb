"""The online-softmax algebra, written once for every kernel.

A state is ``(peak, total, acc)`` for some rows: ``peak`` the largest score so far in base 2, ``total`` the
sum of ``2 ** (score - peak)``, ``acc`` the sum of ``2 ** (score - peak) * v``. While tiles are taken in a row
may have a total for each place in a tile, which :func:`gather` adds up at the end: warps that share a row
would have to meet for the sum over every tile. Scores come in base 2 (times
log2 e), as the hardware's exponential is. The neutral element has ``peak = -inf``; nothing here
turns it into a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MANY_ROWS = tl.constexpr(64)
"""Rows of a tile from which instructions are saved where registers can be spent on it. Few rows need their
instructions less, and kernels of warps with roles have been seen to lose more by another order of them."""

ONE_EACH = tl.constexpr(32 * 4)
"""Numbers of a block up to which each of 32 threads has but one of a column: it reads four of a row."""


@triton.jit
def empty(ROWS: tl.constexpr, TOTALS: tl.constexpr, COLS: tl.constexpr) -> tl.tuple:
    """State of rows that have seen no key, with as many totals each as a tile has keys, or one."""
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, TOTALS), tl.float32)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    return peak, total, acc


@triton.jit
def _pivot(peak: tl.tensor) -> tl.tensor:
    """What to subtract before the exponential: peak, but 0 where it is -inf, since -inf - -inf is NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def weigh(peak: tl.tensor, total: tl.tensor, scores: tl.tensor, factor: tl.tensor) -> tl.tuple:
    """Weights (rows, keys) of one tile of keys, whose scores times a positive factor are in base 2.

    Returns:
        The new peak and total, what the values seen so far are to be multiplied with, and the weights.
    """
    peak_new = tl.maximum(peak, tl.max(scores, 1) * factor)
    pivot = _pivot(peak_new)
    alpha = tl.exp2(peak - pivot)
    p = tl.exp2(tl.fma(scores, factor, -pivot[:, None]))
    if total.shape[1] == 1:
        total = total * alpha[:, None] + tl.sum(p, 1, keep_dims=True)
    else:
        total = total * alpha[:, None] + p
    return peak_new, total, alpha, p


@triton.jit
def update(
    peak: tl.tensor, total: tl.tensor, acc: tl.tensor, scores: tl.tensor, factor: tl.tensor, v: tl.tensor
) -> tl.tuple:
    """Take one tile of keys in: scores (rows, keys) and a factor as in :func:`weigh`, v (keys, columns)."""
    peak, total, alpha, p = weigh(peak, total, scores, factor)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit
def gather(peak: tl.tensor, total: tl.tensor, acc: tl.tensor) -> tl.tuple:
    """The state with one total for each row, when the last tile is in."""
    return peak, tl.sum(total, 1), acc


@triton.jit
def fold(
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    peak_other: tl.tensor,
    total_other: tl.tensor,
    acc_other: tl.tensor,
) -> tl.tuple:
    """State of rows that have seen the keys of two states, with the same bits in whichever kernel: products
    and sums are written as what the hardware is to do, so no compiler merges one product here, another there.

    The 0 that is added to a product turns -0 into 0: a state that was merged with an empty one is the same.
    """
    peak_new = tl.maximum(peak, peak_other)
    pivot = _pivot(peak_new)
    alpha = tl.exp2(peak - pivot)
    beta = tl.exp2(peak_other - pivot)
    total = tl.fma(total, alpha, tl.fma(total_other, beta, 0.0))
    acc = tl.fma(acc, alpha[:, None], tl.fma(acc_other, beta[:, None], 0.0))
    return peak_new, total, acc


@triton.jit
def _halve(x: tl.tensor) -> tl.tensor:
    """Sums of two lanes each, half of all apart: x (lanes,) or (lanes, columns)."""
    half: tl.constexpr = x.shape[0] // 2
    if len(x.shape) == 1:
        x = tl.reshape(x, (2, half))
    else:
        x = tl.reshape(x, (2, half, x.shape[1]))
    return tl.sum(x, 0)


@triton.jit
def _sum_of_lanes(x: tl.tensor) -> tl.tensor:
    """Sum over up to 8 lanes: of two at a time, so that no layout of threads tells the order."""
    tl.static_assert(x.shape[0] <= 8)
    for _ in tl.static_range(3):
        if x.shape[0] > 1:
            x = _halve(x)
    return tl.sum(x, 0)


@triton.jit
def join(peak: tl.tensor, total: tl.tensor, acc: tl.tensor) -> tl.tuple:
    """State of one row from those of lanes: peak (lanes,), total (lanes,), acc (lanes, columns).

    Products are written as in :func:`fold`: one that is merged into the sum with another lane's would be
    rounded there, not here.
    """
    top = tl.max(peak, 0)
    weight = tl.exp2(peak - _pivot(top))
    totals = tl.fma(weight, total, 0.0)
    return top, _sum_of_lanes(totals), _sum_of_lanes(tl.fma(weight[:, None], acc, 0.0))


@triton.jit
def from_partials(lse: tl.tensor, out: tl.tensor) -> tl.tuple:
    """State of one row whose keys were seen by several programs: lse (parts,), out (parts, columns).

    For one warp. Where a thread may have one part of a column, its product is written as in :func:`fold`:
    merged into the sum with another thread's, each of the two would come to a sum of its own.
    """
    lse_log2 = lse * LOG2E
    peak = tl.max(lse_log2, 0)
    weight = tl.exp2(lse_log2 - _pivot(peak))
    if out.shape[0] * out.shape[1] <= ONE_EACH:
        weighted = tl.fma(weight[:, None], out, 0.0)
    else:
        weighted = weight[:, None] * out
    return peak, tl.sum(weight, 0), tl.sum(weighted, 0)


@triton.jit
def merge(
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    peak_other: tl.tensor,
    total_other: tl.tensor,
    acc_other: tl.tensor,
) -> tl.tuple:
    """State of one row that has seen the keys of two states."""
    peak_new = tl.maximum(peak, peak_other)
    pivot = _pivot(peak_new)
    alpha = tl.exp2(peak - pivot)
    beta = tl.exp2(peak_other - pivot)
    return peak_new, total * alpha + total_other * beta, acc * alpha + acc_other * beta


@triton.jit
def denominator(total: tl.tensor) -> tl.tensor:
    """total, but 1 for an empty state, whose output is to be 0."""
    return tl.where(total == 0.0, 1.0, total)


@triton.jit
def inverse(total: tl.tensor) -> tl.tensor:
    """What acc is to be multiplied with."""
    return 1.0 / denominator(total)


@triton.jit
def output(acc: tl.tensor, total: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """acc over total, for a state of a tile of so many rows; 0 for an empty one.

    Of many rows each is divided once and its columns are multiplied. Who may write the result of the same
    part does it by this function, with the rows of its tile, not those that it has: the bits are the same.
    """
    if ROWS >= MANY_ROWS:
        out = acc * inverse(total)
    else:
        out = acc / denominator(total)
    return out


@triton.jit
def log_sum_exp(peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Natural log-sum-exp of a state; -inf for an empty one."""
    return tl.where(total == 0.0, float("-inf"), (peak + tl.log2(denominator(total))) * LN2)
