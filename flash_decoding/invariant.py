"""Numbers of batch-invariant mode: with a sequence's own length they decide its bits."""

from __future__ import annotations

SPLIT_TOKENS = 1024
"""Keys per split: one number for every call, so that no neighbour can change it. A sequence that had more
than MOST_SPLITS of them has larger ones; how large, only its own length says."""

MOST_SPLITS = 128
"""Splits of a sequence at most: what is added up in the end stays little."""

LEAF_TOKENS = 256
"""Keys of a leaf. Leaves are merged into a split one after the other; in short calls each has a program."""

SHORT_LEAVES = 4
"""How many times smaller the leaves of a sequence of one split are."""

LEAFY_SPLITS = 8
"""Splits of a sequence up to which they are made of several leaves. With more of them each is one leaf: there
are programs enough, and merging leaves takes time."""
