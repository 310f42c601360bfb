"""How the kernels share keys out, asked of the function that they share them with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.invariant import LEAFY_SPLITS, MOST_SPLITS, SHORT_LEAVES
from flash_decoding.kernels import keys

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16


MAX_PARTS = 1024


@triton.jit(do_not_specialize=["lo", "hi", "num_parts", "split_tiles", "leaf_tiles", "by_leaf"])  # type: ignore[untyped-decorator]  # triton.jit
def share_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    out_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    num_parts: tl.tensor,
    split_tiles: tl.tensor,
    leaf_tiles: tl.tensor,
    by_leaf: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - a compile-time constant
    PARTS: tl.constexpr,  # noqa: N803 - likewise
    PAGED: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    parts = tl.arange(0, PARTS)
    first, step, count, leaf, live = keys.part_of(
        parts, lo, hi, num_parts, split_tiles, leaf_tiles, by_leaf, BLOCK, PAGED
    )
    tl.store(out_ptr, live)
    tl.store(out_ptr + 1, leaf)
    hands = out_ptr + 2 + parts * 3
    tl.store(hands, first)
    tl.store(hands + 1, tl.zeros_like(parts) + step)
    tl.store(hands + 2, count)


def share(
    lo: int, hi: int, num_parts: int, fixed: tuple[int | None, int | None, int | None], *, paged: bool = False
) -> tuple[int, list[list[int]]]:
    """Tiles of a leaf, and the tiles of each live part."""
    out = torch.zeros(2 + 3 * MAX_PARTS, dtype=torch.int32, device=DEVICE)
    share_kernel[(1,)](out, lo, hi, num_parts, *fixed, BLOCK_N, MAX_PARTS, paged)
    live, leaf = out[:2].tolist()
    hands = out[2:].view(MAX_PARTS, 3)[:live].tolist()
    return leaf, [[first + i * step for i in range(count)] for first, step, count in hands]


def tiles_seen(lo: int, hi: int) -> range:
    return range(lo // BLOCK_N, -(-hi // BLOCK_N)) if hi > lo else range(0)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 300), st.booleans())
def test_splits_cover_every_tile_once(lo: int, hi: int, num_splits: int, paged: bool) -> None:
    _, splits = share(lo, hi, num_splits, (None, None, None), paged=paged)
    assert sorted(tile for split in splits for tile in split) == list(tiles_seen(lo, hi))
    assert len(splits) <= num_splits
    assert len(splits) == 1 or all(splits), "a live split has tiles"
    sizes = [len(split) for split in splits]
    assert max(sizes) - min(sizes) <= 1, "shared evenly"


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(0, 9000),
    st.integers(0, 9000),
    st.integers(1, 600),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
)
def test_parts_of_a_fixed_size_lie_in_a_row(  # noqa: PLR0917 - drawn one by one
    lo: int, hi: int, num_parts: int, split_tiles: int, leaf_tiles: int, by_leaf: bool
) -> None:
    """As many tiles as the sequence's own say; never more parts than scratch has room for."""
    tiles = tiles_seen(lo, hi)
    leaf, parts = share(lo, hi, num_parts, (split_tiles, leaf_tiles, int(by_leaf)))
    split = max(split_tiles, -(-len(tiles) // MOST_SPLITS))
    if len(tiles) > LEAFY_SPLITS * split_tiles:
        assert leaf == split, "many splits have one leaf each"
    else:
        assert leaf == (max(leaf_tiles // SHORT_LEAVES, 1) if len(tiles) <= split_tiles else leaf_tiles)
    size = leaf if by_leaf else -(-split // leaf) * leaf
    if not by_leaf:
        assert len(parts) <= MOST_SPLITS
    want = [list(tiles[first : first + size]) for first in range(0, len(tiles), size)] or [[]]
    assert parts == want[:num_parts]
