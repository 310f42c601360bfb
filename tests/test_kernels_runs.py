"""How work is shared across sequences, asked of the functions that the kernels share it with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.kernels import runs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16
CAPACITY = 100_000

Part = tuple[int, int, range]
"""Its number, its sequence, and the tiles that it reads."""


@triton.jit(do_not_specialize=["num_runs", "batch", "capacity"])  # type: ignore[untyped-decorator]  # triton.jit
def find_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    found_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    seqlens_ptr: tl.tensor,
    num_runs: tl.tensor,
    batch: tl.tensor,
    capacity: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - compile-time constants
    AMONG_FEW: tl.constexpr,  # noqa: N803 - as well
) -> None:
    pid = tl.program_id(0)
    lanes = tl.arange(0, runs.BATCH)
    _, tiles = runs.tiles_of(
        lanes, batch, seqlens_ptr, None, None, 1, 0, capacity, -1, -1, 1, BLOCK, False, False
    )
    if pid < num_runs:
        if AMONG_FEW:
            b, before, size, total, extra = runs.find_among_few(pid, num_runs, batch, lanes, tiles, BLOCK)
        else:
            b, before, size, total, extra = runs.find(
                pid, num_runs, batch, seqlens_ptr, None, None, 1, 0, capacity, -1, -1, lanes, tiles, True, 1,
                BLOCK, False, False,
            )  # fmt: skip
        tl.store(found_ptr + pid * 5, b)
        tl.store(found_ptr + pid * 5 + 1, before)
        tl.store(found_ptr + pid * 5 + 2, size)
        tl.store(found_ptr + pid * 5 + 3, total)
        tl.store(found_ptr + pid * 5 + 4, extra)
    if pid < batch:
        first, count = runs.parts_of(
            pid, num_runs, batch, seqlens_ptr, None, None, 1, 0, capacity, -1, -1, 1, BLOCK, False, False
        )
        tl.store(parts_ptr + pid * 2, first)
        tl.store(parts_ptr + pid * 2 + 1, count)


def walk(
    lengths: list[int], num_runs: int, *, among_few: bool = False
) -> tuple[list[list[Part]], list[range]]:
    """The parts of every run as the attention kernel goes along, and those that the combine looks for."""
    batch = len(lengths)
    found = torch.zeros(num_runs, 5, dtype=torch.int32, device=DEVICE)
    parts = torch.zeros(batch, 2, dtype=torch.int32, device=DEVICE)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    find_kernel[(max(num_runs, batch),)](found, parts, seqlens, num_runs, batch, CAPACITY, BLOCK_N, among_few)
    tiles = [-(-length // BLOCK_N) for length in lengths]
    written = [_run(run, row, tiles) for run, row in enumerate(found.tolist())]
    return written, [range(first, first + count) for first, count in parts.tolist()]


def _run(run: int, found: list[int], tiles: list[int]) -> list[Part]:
    b, before, size, total, extra = found
    at, stop = run * size, min(run * size + size, total)
    parts = []
    while at < stop:
        until = min(before + tiles[b] + extra, stop)
        seen = range(max(at - before - extra, 0), max(until - before - extra, 0))
        parts.append((run + b, b, seen))
        at, before, b = until, before + tiles[b] + extra, b + 1
    return parts


def check(lengths: list[int], num_runs: int) -> list[list[Part]]:
    by_run, looked_for = walk(lengths, num_runs)
    if len(lengths) <= runs.BATCH.value:
        assert walk(lengths, num_runs, among_few=True)[0] == by_run
    parts = [part for run in by_run for part in run]
    assert len({number for number, _, _ in parts}) == len(parts), "no two write to one place"
    for b, length in enumerate(lengths):
        of_b = [(number, seen) for number, sequence, seen in parts if sequence == b]
        assert [number for number, _ in of_b] == list(looked_for[b])
        assert [tile for _, seen in of_b for tile in seen] == list(range(-(-length // BLOCK_N)))
    return by_run


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(st.lists(st.integers(0, 2000), min_size=1, max_size=20), st.integers(1, 40))
def test_every_tile_is_in_one_part(lengths: list[int], num_runs: int) -> None:
    """And the combine finds the parts that were written, no others."""
    check(lengths, num_runs)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.integers(0, 3000), st.integers(1, 20), st.integers(1, 40))
def test_sequences_of_one_length(length: int, batch: int, num_runs: int) -> None:
    by_run = check([length] * batch, num_runs)
    filled = num_runs // batch * batch
    if filled * 16 >= num_runs * runs.WELL_FILLED.value:
        assert all(len(parts) == 1 for parts in by_run[:filled]), "no run crosses a border"
        assert not any(by_run[filled:])


@pytest.mark.parametrize("lengths", [[300] * 140, [7 * i % 500 for i in range(300)]], ids=["alike", "ragged"])
def test_more_sequences_than_are_looked_at_together(lengths: list[int]) -> None:
    check(lengths, 9)
    check(lengths, 290)
