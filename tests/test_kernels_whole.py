"""How whole splits are shared across sequences, asked of the functions that the kernel shares them with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.kernels import runs, whole
from tests.test_kernels_keys import splits_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16
CHANGEOVER = runs.CHANGEOVER_KEYS.value // BLOCK_N
CAPACITY = 100_000

Split = tuple[int, int]
"""Its sequence, and its number there."""


@triton.jit(do_not_specialize=["num_runs", "batch", "capacity", "splits"])  # type: ignore[untyped-decorator]  # triton.jit
def find_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    found_ptr: tl.tensor,
    seqlens_ptr: tl.tensor,
    num_runs: tl.tensor,
    batch: tl.tensor,
    capacity: tl.tensor,
    splits: tl.tensor,
    SPLIT_TILES: tl.constexpr,  # noqa: N803 - a compile-time constant
    BLOCK: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    run = tl.program_id(0)
    b, split, left = whole.find(
        run,
        num_runs,
        0,
        batch,
        seqlens_ptr,
        None,
        None,
        1,
        0,
        capacity,
        -1,
        -1,
        splits,
        tl.arange(0, 128),
        1,
        16,
        BLOCK,
        False,
        False,
        (SPLIT_TILES, 1, 1, False, SPLIT_TILES, 1),
    )
    tl.store(found_ptr + run * 3, b)
    tl.store(found_ptr + run * 3 + 1, split)
    tl.store(found_ptr + run * 3 + 2, left)


def tiles_of_splits(length: int, split_tiles: int) -> list[int]:
    """Tiles of each split of a sequence; one without keys has a split without tiles."""
    tiles = -(-length // BLOCK_N)
    splits = splits_of(tiles, split_tiles, split_tiles, 1)
    return [-(-(tiles - split) // splits) for split in range(splits)]


def walk(lengths: list[int], num_runs: int, split_tiles: int) -> list[list[Split]]:
    """The splits of every run, as the attention kernel goes along."""
    found = torch.zeros(num_runs, 3, dtype=torch.int32, device=DEVICE)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    find_kernel[(num_runs,)](found, seqlens, num_runs, len(lengths), CAPACITY, CAPACITY, split_tiles, BLOCK_N)
    tiles = [tiles_of_splits(length, split_tiles) for length in lengths]
    return [_run(row, tiles) for row in found.tolist()]


def _run(found: list[int], tiles: list[list[int]]) -> list[Split]:
    b, split, left = found
    mine = []
    for _ in range(left):
        mine.append((b, split))
        b, split = (b + 1, 0) if split + 1 == len(tiles[b]) else (b, split + 1)
    return mine


def check(lengths: list[int], num_runs: int, split_tiles: int) -> None:
    by_run = walk(lengths, num_runs, split_tiles)
    tiles = [tiles_of_splits(length, split_tiles) for length in lengths]
    dealt = [split for run in by_run for split in run]
    assert dealt == [(b, split) for b, of_b in enumerate(tiles) for split in range(len(of_b))], "each once"
    share = sum(len(of_b) * (of_b[0] + CHANGEOVER) for of_b in tiles) / num_runs
    longest = max(count for of_b in tiles for count in of_b) + CHANGEOVER
    for run in by_run:
        counted = sum(tiles[b][split] + CHANGEOVER for b, split in run)
        assert counted <= share + longest + 1, "half a split too much at each end, and what is rounded"


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 20))
def test_every_split_is_in_one_run_and_runs_are_equal(
    lengths: list[int], num_runs: int, split_tiles: int
) -> None:
    check(lengths, num_runs, split_tiles)


@pytest.mark.parametrize(("full", "num_runs"), [(32, 32), (64, 32), (64, 33), (16, 33)])
def test_full_splits_are_dealt_as_evenly_as_can_be(full: int, num_runs: int) -> None:
    by_run = walk([full * 64 * BLOCK_N], num_runs, 64)
    assert max(map(len, by_run)) == -(-full // num_runs)


def test_a_short_split_more_than_runs_gives_no_run_two_full_ones() -> None:
    by_run = walk([32 * 64 * BLOCK_N, 100], 32, 64)
    assert [len(run) for run in by_run] == [1] * 31 + [2]


def test_a_sequence_of_little_more_than_full_splits_has_equal_ones() -> None:
    assert tiles_of_splits(32 * 64 * BLOCK_N + 1, 64) == [33] + [32] * 63


@pytest.mark.parametrize("lengths", [[300] * 140, [7 * i % 500 for i in range(300)]], ids=["alike", "ragged"])
def test_more_sequences_than_are_looked_at_together(lengths: list[int]) -> None:
    check(lengths, 9, 4)
    check(lengths, 290, 4)


def test_a_long_one_among_many_short_ones() -> None:
    """131072 keys and 63 times 512: 33 runs, none with twice its share."""
    check([512] * 40 + [100_000] + [512] * 23, 33, 64)


def test_splits_of_very_different_sizes() -> None:
    """One sequence has splits of 8 tiles, between others with splits of 2."""
    check([90, 500, 0, 15_000, 64, 64, 64, 64, 1, 3000], 7, 2)
