"""The parts of runs (:mod:`~flash_decoding.kernels.runs`): which tiles each has, and whose they are."""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import keys, runs
from flash_decoding.kernels.load import VIA_L1


@triton.jit
def hand_of(
    at: tl.tensor,
    until: tl.tensor,
    before: tl.tensor,
    behind: tl.tensor,
    size: tl.tensor,
    extra: tl.tensor,
    origin: tl.tensor,
    lowest: tl.tensor,
    highest: tl.tensor,
    PAGED: tl.constexpr,
) -> tl.tuple:
    """Tiles of a part: the first, the step from each to the next, and how many.

    Runs that have nothing but tiles of one sequence deal these out among themselves, as even splits do
    (:func:`keys.hand_of`). At the borders of sequences, and in pages, tiles stay in a row.

    Args:
        at: where the part begins, in tiles counted, as the next three.
        until: where it ends.
        before: where its sequence begins.
        behind: where that ends.
        size: tiles of a run.
        extra: tiles that a sequence counts and has not.
        origin: first tile of the sequence.
        lowest: tiles before this one the program's rows do not see.
        highest: nor those from this one on.
    """
    first = runs.tile_at(origin, at - before, extra)
    last = runs.tile_at(origin, until - before, extra)
    step = 1
    if not PAGED:
        run = at // size
        first_whole, behind_whole = tl.cdiv(before, size), behind // size
        dealt = (run >= first_whole) & (run < behind_whole)
        hand = runs.tile_at(origin, first_whole * size - before, extra) + run - first_whole
        first = tl.where(dealt, hand, first)
        last = tl.where(dealt, runs.tile_at(origin, behind_whole * size - before, extra), last)
        step = tl.where(dealt, behind_whole - first_whole, 1)
    first += tl.cdiv(tl.maximum(lowest - first, 0), step) * step
    return first, step, tl.cdiv(tl.maximum(tl.minimum(last, highest) - first, 0), step)


@triton.jit
def part_at(
    at: tl.tensor,
    b: tl.tensor,
    before: tl.tensor,
    size: tl.tensor,
    extra: tl.tensor,
    stop: tl.tensor,
    row: tl.tensor,
    batch: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    max_q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    PAGED: tl.constexpr,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """The part of sequence b that begins at ``at``, of a run that ends at ``stop``.

    Returns:
        Its queries' first token and number; end of the sequence's slots and [lo, hi) of those that rows from
        ``row`` on see; its tiles as by :func:`hand_of`; where it ends, and where the sequence does.
    """
    origin, tiles = runs.tiles_of(
        b, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA,
    )  # fmt: skip
    behind = before + tiles + extra
    until = tl.minimum(behind, stop)
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len, VIA)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT, VIA,
    )  # fmt: skip
    lowest, highest = lo // BLOCK_N, tl.cdiv(hi, BLOCK_N)
    first, step, count = hand_of(at, until, before, behind, size, extra, origin, lowest, highest, PAGED)
    return q_start, q_len, end, lo, hi, first, step, count, until, behind


@triton.jit
def parts_of(
    b: tl.tensor,
    num_runs: tl.tensor,
    batch: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """First part of sequence b among all, and how many it has."""
    lanes = tl.arange(0, runs.BATCH)
    _, first = runs.tiles_of(
        lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    _, before, size, _, extra = runs.find(
        b, num_runs, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens,
        capacity, window_left, window_right, lanes, first, False, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    _, tiles = runs.tiles_of(
        b, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    first_run = before // size
    return first_run + b, (before + tiles + extra - 1) // size - first_run + 1
