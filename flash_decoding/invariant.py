"""Numbers of batch-invariant mode: with a sequence's own length they decide its bits."""

from __future__ import annotations

SPLIT_TOKENS = 1024
"""Keys of a split at most, unless MOST_SPLITS of them are not enough."""

MANY_HEADS, SPLIT_TOKENS_OF_MANY_HEADS = 8, 2560
"""Key/value heads from which splits are larger, and how large: then they need not make work for all of a GPU,
and what each costs at its end weighs less."""

MOST_SPLITS = 128
"""Splits of a sequence at most: what is added up in the end stays little."""

SMALL_SPLIT_TOKENS = 1024
"""Keys of a split at most where splits have no leaves, in a sequence of few splits: a short call has no other
way to more programs. Of head_dim 128; of wider heads as many bytes."""

SMALL_SPLITS_OF_FEW_ROWS, SMALL_SPLITS = 16, 8
"""Up to how many splits of a sequence are small ones: where its query rows fill no more than the smallest
tile, and where they are more, whose states cost more."""

LEAF_TOKENS = 256
"""Keys of a leaf, more of narrow heads. Leaves are merged into a split one after the other; in short calls
each has a program."""

SHORT_LEAF_TOKENS, FEW_LEAVES = 64, 16
"""Keys of a leaf of a sequence of one split, doubled once or twice where it had more than so many leaves."""

LEAFY_SPLITS = 8
"""Splits of a sequence up to which they are made of several leaves. With more of them each is one leaf: there
are programs enough, and merging leaves takes time."""


def split_tokens(heads_kv: int) -> int:
    """Keys of a split at most."""
    return SPLIT_TOKENS if heads_kv < MANY_HEADS else SPLIT_TOKENS_OF_MANY_HEADS
