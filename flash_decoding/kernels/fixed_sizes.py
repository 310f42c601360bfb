"""Splits and leaves of a fixed size: how bits of batch-invariant calls come to depend on a sequence alone.

A sequence has as many splits as its own tiles say, which share them evenly. A leaf is an online softmax over
a few tiles of a split, started empty; a split is its leaves merged from left to right. Neither neighbours,
capacity nor hardware have a say.

A part is what a program writes to scratch: a split, whose leaves it merges in registers, or a single leaf,
where splits would be too few programs; the reduction (:mod:`~flash_decoding.kernels.fold`) then merges the
leaves of a split as the program would have done. Both have the same bits, so the choice is free.

What kernels are compiled for goes as ``FIXED``: tiles of a split at most (0 where splits are shared evenly),
of a leaf, and of the small leaves of a sequence of one split; whether leaves are parts; tiles of a small
split at most, and up to how many splits of a sequence are small ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding import invariant

if TYPE_CHECKING:
    from flash_decoding.spec import Plan

MOST_SPLITS = tl.constexpr(invariant.MOST_SPLITS)
assert invariant.MOST_SPLITS <= 256, "numbers of splits are turned round in 8 bits"
LEAFY_SPLITS = tl.constexpr(invariant.LEAFY_SPLITS)
FEW_LEAVES = tl.constexpr(invariant.FEW_LEAVES)


@triton.jit
def doublings(tiles: tl.tensor, FIXED: tl.constexpr) -> tl.tensor:
    """How often one split has to be doubled for so many tiles."""
    SPLIT_TILES: tl.constexpr = FIXED[0]
    SMALL_SPLIT_TILES: tl.constexpr = FIXED[4]
    SMALL_SPLITS: tl.constexpr = FIXED[5]
    FIRST: tl.constexpr = SMALL_SPLIT_TILES if SMALL_SPLITS > 1 else SPLIT_TILES
    count = (tiles > FIRST).to(tl.int32)
    for bit in tl.static_range(1, 31):
        if 1 << bit < SMALL_SPLITS:
            count += (tiles > SMALL_SPLIT_TILES << bit).to(tl.int32)
        elif 1 << bit < MOST_SPLITS:
            count += (tiles > SPLIT_TILES << bit).to(tl.int32)
    return count


@triton.jit
def sizes(tiles: tl.tensor, FIXED: tl.constexpr) -> tl.tuple:
    """How often one split is doubled for so many tiles, how many tiles each split has and how many have one
    more, how many leaves there can be of a split, and tiles of a leaf.

    Splits are a power of two, so that runs of sequences of one length have the same number of them, and no
    division is needed. A sequence of one split has small leaves, twice or four times as large where there are
    more than FEW_LEAVES of them; of one with many splits each is a single leaf. There are never more than
    MOST_SPLITS: what is added up in the end stays little.
    """
    LEAF_TILES: tl.constexpr = FIXED[1]
    SHORT_TILES: tl.constexpr = FIXED[2]
    twofold = doublings(tiles, FIXED)
    splits = 1 << twofold
    least = tiles >> twofold
    larger = tiles & (splits - 1)
    largest = least + (larger > 0).to(tl.int32)
    of_one, leaves_of_one = SHORT_TILES, tl.cdiv(tiles, SHORT_TILES)
    for longer in tl.static_range(1, 3):
        is_longer = leaves_of_one > FEW_LEAVES
        of_one = tl.where(is_longer, SHORT_TILES << longer, of_one)
        leaves_of_one = tl.where(is_longer, tl.cdiv(tiles, SHORT_TILES << longer), leaves_of_one)
    is_leafy = splits <= LEAFY_SPLITS
    leaf = tl.where(splits == 1, of_one, tl.where(is_leafy, LEAF_TILES, largest))
    leaves = tl.where(splits == 1, leaves_of_one, tl.where(is_leafy, tl.cdiv(largest, LEAF_TILES), 1))
    return twofold, least, larger, tl.maximum(leaves, 1), leaf


@triton.jit
def parts_of(
    size: tl.tuple,  # as by :func:`sizes`
    num_parts: tl.tensor,
    FIXED: tl.constexpr,
) -> tl.tensor:
    """Parts of all splits; never more than ``num_parts``, which scratch has room for."""
    twofold, _, _, leaves, _ = size
    per_split = leaves if FIXED[3] else 1
    return tl.minimum(per_split << twofold, num_parts)


@triton.jit
def hand_number(split: tl.tensor, twofold: tl.tensor) -> tl.tensor:
    """Which hand of the cards a split has: its number, with the order of its bits turned round.

    So splits that follow each other lie far apart, and programs with several of them each read, at any time,
    tiles that lie side by side; and hands that have one tile more are spread among them.
    """
    turned = ((split & 0x55) << 1) | ((split >> 1) & 0x55)
    turned = ((turned & 0x33) << 2) | ((turned >> 2) & 0x33)
    turned = ((turned & 0x0F) << 4) | ((turned >> 4) & 0x0F)
    return turned >> (8 - twofold)


@triton.jit
def hand_of(
    part: tl.tensor,
    origin: tl.tensor,
    size: tl.tuple,  # as by :func:`sizes`
    PAGED: tl.constexpr,
    FIXED: tl.constexpr,
) -> tl.tuple:
    """Tiles of a part: the first, the step from each to the next, and how many.

    Splits are dealt out as even ones are (:func:`keys.hand_of`); those of pages stay in a row. The last leaf
    of a split may have fewer tiles than the others, or none.
    """
    twofold, least, larger, leaves, leaf = size
    splits = 1 << twofold
    split = part // leaves if FIXED[3] else part
    if PAGED:
        before = split * larger >> twofold
        first = split * least + before
        has_more = ((split + 1) * larger >> twofold) > before
        step = 1
    else:
        first = hand_number(split, twofold)
        has_more = first < larger
        step = splits
    count = tl.where(split < splits, least + has_more.to(tl.int32), 0)
    if FIXED[3]:
        skipped = (part - split * leaves) * leaf
        first += skipped * step
        count = tl.minimum(tl.maximum(count - skipped, 0), leaf)
    return origin + first, step, count


def constants(plan: Plan) -> dict[str, int | bool]:
    """``FIXED`` of a plan, by its parts: what kernels are compiled for."""
    block_n = max(plan.tile.block_n, 1)
    leaf_tiles = max(1, (plan.leaf_tokens or plan.split_tokens) // block_n)
    shorter = invariant.LEAF_TOKENS // invariant.SHORT_LEAF_TOKENS
    split_tiles = plan.split_tokens // block_n
    return {
        "SPLIT_TILES": split_tiles,
        "LEAF_TILES": leaf_tiles,
        "SHORT_TILES": max(1, leaf_tiles // shorter),
        "BY_LEAF": plan.by_leaf,
        "SMALL_SPLIT_TILES": min(plan.small_split_tokens // block_n, split_tiles),
        "SMALL_SPLITS": plan.small_splits,
    }


def merges_leaves(plan: Plan) -> bool:
    """Whether a program makes a split of several leaves."""
    return plan.leaf_tokens > 0 and not plan.by_leaf
