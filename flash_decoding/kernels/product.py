"""The two products of attention, in the orientation that suits the matrix units.

Hopper's read an operand of 64 rows out of shared memory, where asynchronous copies put keys and values: no
thread loads them. A tile has 64 keys sooner than 64 query rows. So there the products are turned: keys times
queries, values times weights, and a transposition of registers that is none for the hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores_of(q: tl.tensor, k: tl.tensor, TURNED: tl.constexpr) -> tl.tensor:
    """(rows, keys) of q (rows, head_dim) and k (keys, head_dim), fp32."""
    if TURNED:
        products = tl.trans(tl.dot(k, tl.trans(q), input_precision="ieee"))
    else:
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
    return products


@triton.jit
def weigh(weights: tl.tensor, v: tl.tensor, acc: tl.tensor, TURNED: tl.constexpr) -> tl.tensor:
    """acc (rows, columns) plus weights (rows, keys) times v (keys, columns)."""
    if TURNED:
        total = tl.trans(tl.dot(tl.trans(v), tl.trans(weights), tl.trans(acc), input_precision="ieee"))
    else:
        total = tl.dot(weights, v, acc, input_precision="ieee")
    return total
