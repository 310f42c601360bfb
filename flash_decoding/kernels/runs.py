"""Equal work for every program, whatever the lengths: who reads what is computed on the device.

Even splits give every sequence as many programs as any other, a short one as many as a long one. Here the
live tiles of all sequences lie one behind the other instead, and each of ``runs`` programs takes as many of
them as the next, across the borders of sequences::

    tiles   | sequence 0                        | 1 | 2      | 3                    |
    runs    | run 0     | run 1     | run 2     | run 3     | run 4     | run 5     |
    parts     0           1           2       2   4 5      6   7          8

What a run has of a sequence is a part. Going along the tiles, each new part belongs to the next run or to the
next sequence (or both), so run + sequence numbers them, and those of one sequence follow each other. The
attention kernel and the combine both find them from the lengths, by the same function.

What counts is time, so each sequence counts some tiles more than it has: going over to it costs as much. One
without tiles counts those alone; somebody has to write its result.

Sequences that are all of one length share better the plain way, the same number of whole runs for each: so
many tiles more are counted then that none of the runs crosses a border.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import keys
from flash_decoding.kernels.load import VIA_L1

BATCH = tl.constexpr(128)
"""Sequences looked at together."""

FEW = tl.constexpr(32)
"""Sequences up to which a search for where work begins looks at no more. Each warp does it alone, in the time
before a program may read."""

MIN_TILES = tl.constexpr(4)
"""Tiles of a run at least: shorter ones cost more than they balance."""

CHANGEOVER_KEYS = tl.constexpr(128)
"""Keys that could be read while a program goes over to another sequence."""

WELL_FILLED = tl.constexpr(15)
"""Sixteenths of the runs that have work, from which sequences of one length get the same number of runs."""

ANY_ROW = tl.constexpr(1 << 20)


@triton.jit
def tiles_of(
    sequences: tl.tensor,
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
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """First tile that any query of each sequence sees, and how many; -1 from ``batch`` on."""
    inside = sequences < batch
    length = tl.load(cache_seqlens_ptr + sequences, mask=inside, other=0, cache_modifier=VIA)
    length = tl.maximum(length, 0)
    end = tl.minimum(length + new_tokens, capacity)
    first = end * 0  # of its shape, in both of Triton's languages
    if cache_leftpad_ptr is not None:
        first = tl.load(cache_leftpad_ptr + sequences, mask=inside, other=0, cache_modifier=VIA)
        first = tl.maximum(first, 0)
    tokens = q_len
    if cu_seqlens_q_ptr is not None:
        start = tl.load(cu_seqlens_q_ptr + sequences, mask=inside, other=0, cache_modifier=VIA)
        stop = tl.load(cu_seqlens_q_ptr + sequences + 1, mask=inside, other=0, cache_modifier=VIA)
        tokens = tl.minimum(stop - start, q_len)
    lo, hi = keys.visible_slots(
        0, tokens, first, end, window_left, window_right, GROUP, ANY_ROW, BOUND_LEFT, BOUND_RIGHT
    )
    origin = lo // BLOCK_N
    tiles = tl.maximum(tl.cdiv(hi, BLOCK_N) - origin, 0)
    return origin, tl.where(inside, tiles, -1)


@triton.jit
def tile_at(origin: tl.tensor, counted: tl.tensor, extra: tl.tensor) -> tl.tensor:
    """The tile that so many counted ones of a sequence end before; those that it has not come first."""
    return origin + tl.maximum(counted - extra, 0)


@triton.jit
def size_of(
    total: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    runs: tl.tensor,
    batch: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """Tiles of a run, and how many more each sequence counts than it has.

    Args:
        total: tiles of all sequences.
        least: tiles of the shortest.
        most: of the longest.
        runs: how many share them.
        batch: sequences.
    """
    changeover: tl.constexpr = (CHANGEOVER_KEYS + BLOCK_N - 1) // BLOCK_N
    each = runs // batch
    alike = (least == most) & (each * batch * 16 >= runs * WELL_FILLED)
    whole = tl.maximum(tl.cdiv(most, tl.maximum(each, 1)), MIN_TILES)
    even = tl.maximum(tl.cdiv(total + batch * changeover, runs), MIN_TILES)
    return tl.where(alike, whole, even), tl.where(alike, whole * each - most, changeover)


@triton.jit
def passed_by(
    target: tl.tensor,
    goal: tl.tensor,
    seen: tl.tensor,
    sequences: tl.tensor,
    counted: tl.tensor,
    BY_RUN: tl.constexpr,
) -> tl.tuple:
    """How many of these sequences lie before the target, what they count, and what all of them count."""
    if BY_RUN:
        passed = (seen + tl.cumsum(counted, 0) <= goal) & (counted > 0)
    else:
        passed = sequences < target
    return tl.sum(passed.to(tl.int32), 0), tl.sum(tl.where(passed, counted, 0), 0), tl.sum(counted, 0)


@triton.jit
def summed(tiles: tl.tensor) -> tl.tuple:
    """Tiles of some sequences together, of the shortest, and of the longest."""
    most = tl.max(tiles, 0)
    return tl.sum(tl.maximum(tiles, 0), 0), tl.min(tl.where(tiles < 0, most, tiles), 0), most


@triton.jit
def find_among_few(
    run: tl.tensor,
    runs: tl.tensor,
    batch: tl.tensor,
    lanes: tl.tensor,
    tiles: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tuple:
    """As :func:`find` of a run, from the tiles of all sequences at hand: BATCH at most."""
    total, least, most = summed(tiles)
    size, extra = size_of(total, least, most, runs, batch, BLOCK_N)
    counted = tl.where(tiles < 0, 0, tiles + extra)
    sequence, before, _ = passed_by(run, run * size, 0, lanes, counted, True)
    return sequence, before, size, total + batch * extra, extra


@triton.jit
def find_early(
    run: tl.tensor,
    runs: tl.tensor,
    batch: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    lanes: tl.tensor,  # 0 to BATCH
    tiles: tl.tensor,  # of these
    few: tl.tensor,  # 0 to FEW
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    VIA: tl.constexpr,
) -> tl.tuple:
    """As :func:`find` of a run, among BATCH sequences at most, by lengths that may yet change."""
    if batch <= FEW:
        _, of_few = tiles_of(
            few, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens, capacity,
            window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA,
        )  # fmt: skip
        b, before, size, all_tiles, extra = find_among_few(run, runs, batch, few, of_few, BLOCK_N)
    else:
        b, before, size, all_tiles, extra = find_among_few(run, runs, batch, lanes, tiles, BLOCK_N)
    return b, before, size, all_tiles, extra


@triton.jit
def find(
    target: tl.tensor,
    runs: tl.tensor,
    batch: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    q_len: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    lanes: tl.tensor,
    first: tl.tensor,
    BY_RUN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """Where a run begins, or a sequence does.

    Args:
        lanes: 0 to BATCH.
        first: tiles of these sequences, by :func:`tiles_of`.

    Returns:
        The sequence that run ``target`` begins in (``target`` itself unless BY_RUN), what is counted before
        it, the tiles of a run, what is counted of all sequences, and how many more each counts than it has.
    """
    total, least, most = summed(first)
    for start in range(BATCH, batch, BATCH):
        _, tiles = tiles_of(
            start + lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens,
            capacity, window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        total, most = total + tl.sum(tl.maximum(tiles, 0), 0), tl.maximum(most, tl.max(tiles, 0))
        least = tl.minimum(least, tl.min(tl.where(tiles < 0, least, tiles), 0))
    size, extra = size_of(total, least, most, runs, batch, BLOCK_N)

    counted = tl.where(first < 0, 0, first + extra)
    sequence, before, seen = passed_by(target, target * size, 0, lanes, counted, BY_RUN)
    for start in range(BATCH, batch, BATCH):
        _, tiles = tiles_of(
            start + lanes, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, q_len, new_tokens,
            capacity, window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        counted = tl.where(tiles < 0, 0, tiles + extra)
        more, more_before, more_seen = passed_by(target, target * size, seen, start + lanes, counted, BY_RUN)
        sequence, before, seen = sequence + more, before + more_before, seen + more_seen
    return sequence, before, size, total + batch * extra, extra
