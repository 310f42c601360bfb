"""From dot products to scores in base 2: scale, softcap, ALiBi. A new option on scores goes here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels.softmax import LOG2E

if TYPE_CHECKING:
    from torch import Tensor


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


@triton.jit
def transform(
    products: tl.tensor,
    slots: tl.tensor,
    position: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    slope: tl.tensor,
    alibi_ptr: tl.tensor,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """Scores (rows, keys) in base 2, as ``spec.Options`` defines them."""
    if SOFTCAP:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
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
