"""From dot products to scores in base 2: scale, softcap, ALiBi. A new option on scores goes here.

Where a positive scale is all there is, it waits: scores are products until they are weighed, which takes one
instruction then for another product and a difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels.softmax import LOG2E

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import Options


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Hyperbolic tangent by the exponential of -2|x|, which cannot overflow."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    magnitude = (1.0 - t) / (1.0 + t)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def slopes(
    alibi_ptr: tl.tensor, strides: tl.tuple, b: tl.tensor, head: tl.tensor, in_q: tl.tensor
) -> tl.tensor:
    """ALiBi slope of every row; zeros without ALiBi, which nobody reads."""
    if alibi_ptr is None:
        slope = (head * 0).to(tl.float32)
    else:
        offsets = tl.cast(b, tl.int64) * strides[0] + head * strides[1]
        slope = tl.load(alibi_ptr + offsets, mask=in_q, other=0.0)
    return slope


_FACTORED, _SCALED, _CAPPED = range(3)
FACTORED, SCALED, CAPPED = tl.constexpr(_FACTORED), tl.constexpr(_SCALED), tl.constexpr(_CAPPED)
"""Ways of scores, as kernels are compiled for them: the scale is left to be a factor; or it has gone in; or a
softcap has, too. As a factor it must be positive, and no ALiBi may come after it."""


def way_of(options: Options) -> int:
    """The way of a call's scores."""
    if options.softcap > 0:
        return _CAPPED
    waits = options.softmax_scale > 0 and options.alibi_slopes is None
    return _FACTORED if waits else _SCALED


@triton.jit
def factor(scale: tl.tensor, SCORES: tl.constexpr) -> tl.tensor:
    """What is left to multiply scores with."""
    return scale * LOG2E if SCORES == FACTORED else scale * 0 + 1


@triton.jit
def transform(
    products: tl.tensor,
    slots: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    slope: tl.tensor,
    alibi_ptr: tl.tensor,
    SCORES: tl.constexpr,
) -> tl.tensor:
    """Scores (rows, keys) in base 2 as ``spec.Options`` defines them, but for their :func:`factor`."""
    scores = products
    if SCORES == CAPPED:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    if SCORES == SCALED:
        scores = products * (scale * LOG2E)
    if alibi_ptr is not None:
        distance = tl.abs(position[:, None] - slots[None, :]).to(tl.float32)
        scores -= (slope * LOG2E)[:, None] * distance
    return scores


def alibi_strides(alibi_slopes: Tensor | None) -> tuple[int, int]:
    """Strides over (sequence, head) of slopes given per head, or per sequence and head."""
    if alibi_slopes is None:
        return 0, 0
    if alibi_slopes.dim() == 1:
        return 0, alibi_slopes.stride(0)
    return alibi_slopes.stride(0), alibi_slopes.stride(1)
