"""How work is shared across sequences, asked of the functions that the kernels share it with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding.kernels import run_parts, runs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_N = 16
CAPACITY = 100_000

Part = tuple[int, int, range]
"""Its number, its sequence, and the tiles that it reads."""


@triton.jit(do_not_specialize=["num_runs", "batch", "capacity"])  # type: ignore[untyped-decorator]  # triton.jit
def walk_kernel(  # noqa: PLR0917 - a kernel's arguments are positional
    walked_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    seqlens_ptr: tl.tensor,
    num_runs: tl.tensor,
    batch: tl.tensor,
    capacity: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - compile-time constants
    AMONG_FEW: tl.constexpr,  # noqa: N803 - as well
    PAGED: tl.constexpr,  # noqa: N803 - as well
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
        at = pid * size
        stop = tl.minimum(at + size, total)
        while at < stop:
            _, _, _, _, _, first, step, count, until, behind = run_parts.part_at(
                at, b, before, size, extra, stop, 0, batch, seqlens_ptr, None, None, 1, 0, capacity, -1, -1,
                1, 16, BLOCK, False, False, PAGED,
            )  # fmt: skip
            place = walked_ptr + (pid * batch + b) * 4
            tl.store(place, first)
            tl.store(place + 1, step)
            tl.store(place + 2, count)
            tl.store(place + 3, 1)
            at = until
            before = behind
            b += 1
    if pid < batch:
        first_part, live = run_parts.parts_of(
            pid, num_runs, batch, seqlens_ptr, None, None, 1, 0, capacity, -1, -1, 1, BLOCK, False, False
        )
        tl.store(parts_ptr + pid * 2, first_part)
        tl.store(parts_ptr + pid * 2 + 1, live)


def walk(
    lengths: list[int], num_runs: int, *, among_few: bool = False, paged: bool = False
) -> tuple[list[list[Part]], list[range]]:
    """The parts of every run as the attention kernel goes along, and those that the combine looks for."""
    batch = len(lengths)
    walked = torch.zeros(num_runs, batch, 4, dtype=torch.int32, device=DEVICE)
    parts = torch.zeros(batch, 2, dtype=torch.int32, device=DEVICE)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    walk_kernel[(max(num_runs, batch),)](
        walked, parts, seqlens, num_runs, batch, CAPACITY, BLOCK_N, among_few, paged
    )
    by_run = [
        [
            (run + b, b, range(first, first + count * step, step))
            for b, (first, step, count, written) in enumerate(row)
            if written
        ]
        for run, row in enumerate(walked.tolist())
    ]
    return by_run, [range(first, first + count) for first, count in parts.tolist()]


def check(lengths: list[int], num_runs: int) -> list[list[Part]]:
    by_run, looked_for = walk(lengths, num_runs)
    if len(lengths) <= runs.BATCH.value:
        assert walk(lengths, num_runs, among_few=True)[0] == by_run
    check_parts(lengths, by_run, looked_for)
    in_pages, _ = walk(lengths, num_runs, paged=True)
    check_parts(lengths, in_pages, looked_for)
    assert all(seen.step == 1 for parts in in_pages for _, _, seen in parts)
    return by_run


def check_parts(lengths: list[int], by_run: list[list[Part]], looked_for: list[range]) -> None:
    parts = [part for run in by_run for part in run]
    assert len({number for number, _, _ in parts}) == len(parts), "no two write to one place"
    for b, length in enumerate(lengths):
        of_b = [(number, seen) for number, sequence, seen in parts if sequence == b]
        assert [number for number, _ in of_b] == list(looked_for[b])
        assert sorted(tile for _, seen in of_b for tile in seen) == list(range(-(-length // BLOCK_N)))


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.lists(st.integers(0, 2000), min_size=1, max_size=20), st.integers(1, 40))
def test_every_tile_is_in_one_part(lengths: list[int], num_runs: int) -> None:
    """And the combine finds the parts that were written, no others."""
    check(lengths, num_runs)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=20)
@given(st.integers(0, 3000), st.integers(1, 20), st.integers(1, 40))
def test_sequences_of_one_length(length: int, batch: int, num_runs: int) -> None:
    by_run = check([length] * batch, num_runs)
    filled = num_runs // batch * batch
    if filled * 16 >= num_runs * runs.WELL_FILLED.value:
        assert all(len(parts) == 1 for parts in by_run[:filled]), "no run crosses a border"
        assert not any(by_run[filled:])


@pytest.mark.parametrize("lengths", [[300] * 140, [7 * i % 500 for i in range(140)]], ids=["alike", "ragged"])
def test_more_sequences_than_are_looked_at_together(lengths: list[int]) -> None:
    check(lengths, 9)
    check(lengths, 150)


def test_runs_that_have_one_sequence_to_themselves_deal_its_tiles_out() -> None:
    """What they read at the same time lies together then; nobody has more than one tile more than another."""
    (_, *whole, _), _ = walk([10 * BLOCK_N, 400 * BLOCK_N, 5 * BLOCK_N], 8)
    tiles = [seen for parts in whole for _, b, seen in parts if b == 1]
    assert {seen.step for seen in tiles} == {len(tiles)}
    assert max(map(len, tiles)) - min(map(len, tiles)) <= 1
