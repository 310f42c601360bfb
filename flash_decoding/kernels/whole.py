"""Equal work in whole splits of a fixed size: who reads which is computed on the device.

In batch-invariant mode a split is where it is and as large as it is whatever else is in the batch. So work is
shared by dealing splits out whole: those of all sequences lie one behind the other, and each of ``runs``
programs takes neighbours of them, across the borders of sequences::

    splits  | 0,0  | 0,1  | 0,2  | 0,3 |1,0| 2,0  | 2,1  | 2,2 |3,0| 4,0  | 4,1  |       (sequence, split)
    borders :             :             :             :             :             :
    runs    | run 0       | run 1       | run 2       | run 3       | run 4       |

What counts is time: a split counts its tiles, and some more for going over to it. Borders lie at equal
distances along what is counted, and a split belongs to the run that its middle lies in, were it a full one:
so none is in two, and a run has half a split more than its share at each end, at most.

Rows of one tile see other keys than those of the next where there are windows. A program looks at the splits
that its own row tile has; sequences without such rows have none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import keys, runs


@triton.jit
def count(tiles: tl.tensor, splits: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """What so many splits count that have so many tiles together."""
    changeover: tl.constexpr = (runs.CHANGEOVER_KEYS + BLOCK_N - 1) // BLOCK_N
    return tiles + splits * changeover


@triton.jit
def splits_of(
    sequences: tl.tensor,
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
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """First tile, tiles and splits that rows from ``row`` on have of each sequence; none past the last."""
    b = tl.minimum(sequences, batch - 1)
    _, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    origin, tiles, splits = keys.share(lo, hi, num_splits, split_tiles, BLOCK_N)
    has_rows = (sequences < batch) & (row < q_len * GROUP)
    return origin, tl.where(has_rows, tiles, 0), tl.where(has_rows, splits, 0)


@triton.jit
def border(run: tl.tensor, num_runs: tl.tensor, total: tl.tensor, full: tl.tensor) -> tl.tensor:
    """Where splits begin that are of a run, not of the one before: half a full split before their middle."""
    position = (tl.cast(run, tl.int64) * total // num_runs).to(tl.int32)
    return tl.where(run < num_runs, tl.maximum(position - full // 2, 0), total)


@triton.jit
def find(
    run: tl.tensor,
    num_runs: tl.tensor,
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
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """The share of a run.

    Returns:
        The run's first split, as its sequence and its number there; along what is counted, where that split
        begins, and where those begin that are no longer of the run.
    """
    lanes = tl.arange(0, runs.BATCH)
    _, tiles, first_splits = splits_of(
        lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
        capacity, window_left, window_right, num_splits, split_tiles, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
        BOUND_RIGHT,
    )  # fmt: skip
    counted = count(tiles, first_splits, BLOCK_N)
    total = tl.sum(counted, 0)
    for begin in range(runs.BATCH, batch, runs.BATCH):
        _, tiles, splits = splits_of(
            begin + lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, split_tiles, GROUP, BLOCK_M, BLOCK_N,
            BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        total += tl.sum(count(tiles, splits, BLOCK_N), 0)
    full = count(split_tiles, 1, BLOCK_N)
    start, stop = border(run, num_runs, total, full), border(run + 1, num_runs, total, full)

    sequence, before, seen = passed_by(start, 0, counted, first_splits, full)
    for begin in range(runs.BATCH, batch, runs.BATCH):
        _, tiles, splits = splits_of(
            begin + lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, split_tiles, GROUP, BLOCK_M, BLOCK_N,
            BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        more, more_before, more_seen = passed_by(start, seen, count(tiles, splits, BLOCK_N), splits, full)
        sequence, before, seen = sequence + more, before + more_before, seen + more_seen
    split = tl.cdiv(tl.maximum(start - before, 0), full)
    return sequence, split, before + split * full, stop


@triton.jit
def passed_by(
    start: tl.tensor, seen: tl.tensor, counted: tl.tensor, splits: tl.tensor, full: tl.tensor
) -> tl.tuple:
    """How many of these sequences have no split from ``start`` on; what they count, and what all do."""
    last = seen + tl.cumsum(counted, 0) - counted + tl.maximum(splits - 1, 0) * full
    passed = last < start
    return tl.sum(passed.to(tl.int32), 0), tl.sum(tl.where(passed, counted, 0), 0), tl.sum(counted, 0)
