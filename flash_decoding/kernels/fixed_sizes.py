"""Splits and leaves of a fixed size: how bits of batch-invariant calls come to depend on a sequence alone.

    sequence | split 0              | split 1              | split 2       |
             | leaf | leaf | leaf   | leaf | leaf | leaf   | leaf | leaf   |

A leaf is an online softmax over a few tiles, started empty. A split is its leaves merged from left to right.
How large they are follows from the tiles that a row tile sees of its sequence, and from nothing else: neither
neighbours, capacity nor hardware.

A part is what a program writes to scratch: a split, whose leaves it merges in registers, or a single leaf,
where splits would be too few programs; the reduction (:mod:`~flash_decoding.kernels.fold`) then merges the
leaves of a split as the program would have done. Both have the same bits, so the choice is free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding import invariant

if TYPE_CHECKING:
    from flash_decoding.spec import Plan

MOST_SPLITS = tl.constexpr(invariant.MOST_SPLITS)
SHORT_LEAVES = tl.constexpr(invariant.SHORT_LEAVES)
LEAFY_SPLITS = tl.constexpr(invariant.LEAFY_SPLITS)


@triton.jit
def sizes(tiles: tl.tensor, split_tiles: tl.tensor, leaf_tiles: tl.tensor) -> tl.tuple:
    """Tiles of a split and of a leaf of a sequence of which so many are seen; the first has whole leaves.

    A sequence of one split has small leaves; of one with many splits each is a single leaf. One that had more
    than MOST_SPLITS has larger splits: what is added up in the end stays little.
    """
    split = tl.maximum(split_tiles, tl.cdiv(tiles, MOST_SPLITS))
    short = tl.maximum(leaf_tiles // SHORT_LEAVES, 1)
    leaf = tl.where(
        tiles <= split_tiles, short, tl.where(tiles <= LEAFY_SPLITS * split_tiles, leaf_tiles, split)
    )
    return tl.cdiv(split, leaf) * leaf, leaf


@triton.jit
def share(
    tiles: tl.tensor,
    num_parts: tl.tensor,
    split_tiles: tl.tensor,
    leaf_tiles: tl.tensor,
    by_leaf: tl.tensor,
) -> tl.tuple:
    """Tiles of a part, those of a leaf, and how many parts have any (at least one).

    Never are there more than ``num_parts``, which scratch has room for, whatever the lengths say.
    """
    split, leaf = sizes(tiles, split_tiles, leaf_tiles)
    size = tl.where(by_leaf > 0, leaf, split)
    return size, leaf, tl.maximum(tl.minimum(tl.cdiv(tiles, size), num_parts), 1)


@triton.jit
def hand_of(part: tl.tensor, origin: tl.tensor, tiles: tl.tensor, size: tl.tensor) -> tl.tuple:
    """Tiles of a part: the first, and how many; none beyond the last."""
    first = tl.minimum(part * size, tiles)
    return origin + first, tl.minimum(tiles - first, size)


def arguments(plan: Plan) -> tuple[int | None, int | None, int | None]:
    """What kernels take of a plan: ``split_tiles``, ``leaf_tiles``, ``by_leaf``; None without fixed sizes."""
    if plan.split_tokens == 0:
        return None, None, None
    split_tiles = plan.split_tokens // plan.tile.block_n
    leaf_tiles = max(1, (plan.leaf_tokens or plan.split_tokens) // plan.tile.block_n)
    return split_tiles, leaf_tiles, int(plan.by_leaf)
