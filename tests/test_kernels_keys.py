"""How the kernels share keys out, asked of the function that they share them with."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.invariant import FEW_LEAVES, LEAFY_SPLITS, MOST_SPLITS
from flash_decoding.kernels import fixed_sizes, keys
from flash_decoding.plan import Hardware, make_plan
from flash_decoding.spec import Problem
from tests.plan_cases import H200, WITHOUT_ROLES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16


MAX_PARTS = 1024


@triton.jit(do_not_specialize=["lo", "hi", "num_parts"])  # type: ignore[untyped-decorator]  # triton.jit
def share_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    out_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    num_parts: tl.tensor,
    SPLIT_TILES: tl.constexpr,  # noqa: N803 - a compile-time constant
    LEAF_TILES: tl.constexpr,  # noqa: N803 - likewise
    SHORT_TILES: tl.constexpr,  # noqa: N803 - likewise
    BY_LEAF: tl.constexpr,  # noqa: N803 - likewise
    SMALL_SPLIT_TILES: tl.constexpr,  # noqa: N803 - likewise
    SMALL_SPLITS: tl.constexpr,  # noqa: N803 - likewise
    BLOCK: tl.constexpr,  # noqa: N803 - likewise
    PARTS: tl.constexpr,  # noqa: N803 - likewise
    PAGED: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    parts = tl.arange(0, PARTS)
    fixed = (SPLIT_TILES, LEAF_TILES, SHORT_TILES, BY_LEAF, SMALL_SPLIT_TILES, SMALL_SPLITS)
    first, step, count, leaf, live = keys.part_of(parts, lo, hi, num_parts, BLOCK, PAGED, True, fixed)
    tl.store(out_ptr, live)
    tl.store(out_ptr + 1, leaf)
    hands = out_ptr + 2 + parts * 3
    tl.store(hands, first)
    tl.store(hands + 1, tl.zeros_like(parts) + step)
    tl.store(hands + 2, count)


Fixed = tuple[int, int, int, bool, int, int]
"""Tiles of a split (0: shared evenly), of a leaf and of a small one, whether leaves are parts, tiles of a
small split, and how many of these a sequence may have."""


def share(
    lo: int, hi: int, num_parts: int, fixed: Fixed = (0, 1, 1, False, 0, 0), *, paged: bool = False
) -> tuple[int, list[list[int]]]:
    """Tiles of a leaf, and the tiles of each live part."""
    out = torch.zeros(2 + 3 * MAX_PARTS, dtype=torch.int32, device=DEVICE)
    share_kernel[(1,)](out, lo, hi, num_parts, *fixed, BLOCK_N, MAX_PARTS, paged)
    live, leaf = out[:2].tolist()
    hands = out[2:].view(MAX_PARTS, 3)[:live].tolist()
    return leaf, [[first + i * step for i in range(count)] for first, step, count in hands]


def splits_of(tiles: int, split_tiles: int, small_split_tiles: int, small_splits: int) -> int:
    """One, doubled until they are small enough or there are as many as may be; few have to be smaller."""
    splits = 1
    while splits < MOST_SPLITS:
        if tiles <= splits * (small_split_tiles if splits < small_splits else split_tiles):
            break
        splits *= 2
    return splits


def tiles_seen(lo: int, hi: int) -> range:
    return range(lo // BLOCK_N, -(-hi // BLOCK_N)) if hi > lo else range(0)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 9000), st.integers(0, 9000), st.integers(1, 300), st.booleans())
def test_splits_cover_every_tile_once(lo: int, hi: int, num_splits: int, paged: bool) -> None:
    _, splits = share(lo, hi, num_splits, paged=paged)
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
    st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 1), (5, 3, 2), (32, 4, 1), (8, 1, 1)]),
    st.sampled_from([(1, 8), (2, 8), (5, 16), (2, 1)]),
    st.booleans(),
    st.booleans(),
)
def test_fixed_splits_and_leaves_follow_from_the_sequence_alone(  # noqa: PLR0917 - drawn one by one
    lo: int,
    hi: int,
    num_parts: int,
    sizes: tuple[int, int, int],
    small: tuple[int, int],
    by_leaf: bool,
    paged: bool,
) -> None:
    """As many splits as the sequence's own tiles say, evenly; no more parts than there is room for."""
    split_tiles, leaf_tiles, short = sizes
    tiles = tiles_seen(lo, hi)
    small_split = max(1, split_tiles // small[0]), small[1]
    leaf, parts = share(lo, hi, num_parts, (*sizes, by_leaf, *small_split), paged=paged)
    count = splits_of(len(tiles), split_tiles, *small_split)
    least, larger = divmod(len(tiles), count)
    largest = least + (larger > 0)
    if count == 1:
        sizes_of_one = (short, 2 * short, 4 * short)
        fitting = (size for size in sizes_of_one if -(-len(tiles) // size) <= FEW_LEAVES)
        assert leaf == next(fitting, 4 * short)
    else:
        assert leaf == (leaf_tiles if count <= LEAFY_SPLITS else largest), "many splits have one leaf each"
    if paged:
        borders = [split * least + split * larger // count for split in range(count + 1)]
        splits = [list(tiles[start:stop]) for start, stop in itertools.pairwise(borders)]
    else:
        bits = count.bit_length() - 1
        hands = [int(f"{split:0{bits}b}"[::-1], 2) if bits else 0 for split in range(count)]
        splits = [list(tiles[hand::count]) for hand in hands]
    if by_leaf:
        starts = range(0, max(largest, 1), leaf)
        splits = [split[first : first + leaf] for split in splits for first in starts]
    assert parts == splits[:num_parts]


@triton.jit(do_not_specialize=["lo", "hi", "left", "right"])  # type: ignore[untyped-decorator]  # triton.jit
def clear_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    out_ptr: tl.tensor,
    sees_ptr: tl.tensor,
    position_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    ROWS: tl.constexpr,  # noqa: N803 - a compile-time constant
    SLOTS: tl.constexpr,  # noqa: N803 - likewise
    BOUND_LEFT: tl.constexpr,  # noqa: N803 - likewise
    BOUND_RIGHT: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    rows, slots = tl.arange(0, ROWS), tl.arange(0, SLOTS)
    position = tl.load(position_ptr + rows)
    first, last = keys.seen_by_all(position, lo, hi, left, right, BOUND_LEFT, BOUND_RIGHT)
    tl.store(out_ptr, first)
    tl.store(out_ptr + 1, last)
    live = (slots >= lo) & (slots < hi)
    sees = keys.row_sees(slots, live, position, left, right, BOUND_LEFT, BOUND_RIGHT)
    tl.store(sees_ptr + rows[:, None] * SLOTS + slots[None, :], sees.to(tl.int32))


@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (20, 0), (9, 3), (40, -1)])
@pytest.mark.parametrize(("lo", "hi"), [(0, 64), (7, 50), (30, 31)])
def test_tiles_without_a_mask_are_those_that_every_row_sees(lo: int, hi: int, left: int, right: int) -> None:
    rows, slots = 8, 64
    position = torch.arange(40, 40 + rows, dtype=torch.int32, device=DEVICE)
    out = torch.empty(2, dtype=torch.int32, device=DEVICE)
    sees = torch.empty(rows, slots, dtype=torch.int32, device=DEVICE)
    clear_kernel[(1,)](out, sees, position, lo, hi, left, right, rows, slots, left >= 0, right >= 0)
    seen_by_all = sees.bool().all(0).nonzero().flatten().tolist()
    assert seen_by_all == list(range(*out.tolist()))


@pytest.mark.parametrize("hardware", [H200, WITHOUT_ROLES], ids=("roles", "portable"))
@pytest.mark.parametrize("heads_kv", [2, 8, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("capacity", [1, 63, 64, 500, 1025, 2048, 2500, 4097, 9000, 20_000, 300_000])
def test_plans_have_room_for_every_part(
    capacity: int, head_dim: int, heads_kv: int, hardware: Hardware
) -> None:
    """Of any length up to the capacity; the longest is not the one of most parts."""
    problem = Problem(1, 1, 64, heads_kv, head_dim, head_dim, capacity, 2)
    plan = make_plan(problem, hardware, batch_invariant=True)
    sizes = fixed_sizes.constants(plan)
    fixed: Fixed = (
        sizes["SPLIT_TILES"],
        sizes["LEAF_TILES"],
        sizes["SHORT_TILES"],
        bool(sizes["BY_LEAF"]),
        sizes["SMALL_SPLIT_TILES"],
        sizes["SMALL_SPLITS"],
    )
    most = -(-capacity // plan.tile.block_n)
    largest = {fixed[place] << i for place in (0, 4) for i in range(8)}
    largest |= {FEW_LEAVES * (fixed[2] << i) for i in range(3)}
    lengths = {1, most // 2, most - most // 7, most} | largest | {tiles + 1 for tiles in largest}
    for tiles in sorted(n for n in lengths if n <= most):
        _, parts = share(0, tiles * BLOCK_N, MAX_PARTS, fixed)
        assert len(parts) <= plan.num_splits
