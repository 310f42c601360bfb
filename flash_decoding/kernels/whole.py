"""Equal work in whole splits of a fixed size: who reads which is computed on the device.

In batch-invariant mode a split is where it is and as large as it is whatever else is in the batch. So work is
shared by dealing splits out whole: those of all sequences lie one behind the other, and each of ``runs``
programs takes neighbours of them, across the borders of sequences::

    splits  | 0,0  | 0,1  | 0,2  | 0,3 |1,0| 2,0  | 2,1  | 2,2 |3,0| 4,0  | 4,1  |       (sequence, split)
    borders :             :             :             :             :             :
    runs    | run 0       | run 1       | run 2       | run 3       | run 4       |

What counts is time: a split counts its tiles, and some more for going over to it. Borders lie at equal
distances along what is counted, and a split belongs to the run that its middle lies in: so none
is in two, and a run has half a split more than its share at each end, at most. Splits of a sequence
count alike, though some may have a tile less; how large they are is its own (:func:`fixed_sizes.sizes`).

Rows of one tile see other keys than those of the next where there are windows. A program looks at the splits
that its own row tile has; sequences without such rows have none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import fixed_sizes, keys, runs
from flash_decoding.kernels.load import VIA_L1


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
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    FIXED: tl.constexpr,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """Splits that rows from ``row`` on have of each sequence (none past the last sequence), what these count
    together, and what one does.
    """
    changeover: tl.constexpr = (runs.CHANGEOVER_KEYS + BLOCK_N - 1) // BLOCK_N
    b = tl.minimum(sequences, batch - 1)
    _, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len, VIA)
    _, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT, VIA,
    )  # fmt: skip
    _, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
    size = fixed_sizes.sizes(tiles, FIXED)
    _, least, larger, _, leaf = size
    has_rows = (sequences < batch) & (row < q_len * GROUP)
    parts = tl.where(has_rows, fixed_sizes.parts_of(size, num_splits, FIXED), 0)
    counted = (leaf if FIXED[3] else least + (larger > 0).to(tl.int32)) + changeover
    return parts, parts * counted, counted


@triton.jit
def border(run: tl.tensor, num_runs: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Where a run begins, along what is counted."""
    share = total // num_runs
    return run * share + tl.minimum(run, total - share * num_runs)


@triton.jit
def before(
    target: tl.tensor, seen: tl.tensor, splits: tl.tensor, counted: tl.tensor, full: tl.tensor
) -> tl.tuple:
    """How many splits of each sequence have their middle before the target, and whether all of them have.

    ``seen`` is what the sequences before these count.
    """
    end = seen + tl.cumsum(counted, 0)
    begin = end - counted
    passed = tl.minimum(tl.maximum(tl.cdiv(target - full // 2 - begin, full), 0), splits)
    return passed, (passed == splits) & (begin < target)


@triton.jit
def between(
    start: tl.tensor,
    stop: tl.tensor,
    seen: tl.tensor,
    splits: tl.tensor,
    counted: tl.tensor,
    full: tl.tensor,
) -> tl.tuple:
    """Of these sequences: how many have no split from ``start`` on, how many splits the next one has before
    it, how many splits lie between start and stop, and what all of them count.
    """
    earlier, is_done = before(start, seen, splits, counted, full)
    until, _ = before(stop, seen, splits, counted, full)
    first_split = tl.sum(tl.where(is_done, 0, earlier), 0)
    return tl.sum(is_done.to(tl.int32), 0), first_split, tl.sum(until - earlier, 0), tl.sum(counted, 0)


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
    lanes: tl.tensor,  # 0 to runs.BATCH
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    FIXED: tl.constexpr,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """The share of a run: its first split, as a sequence and its number there, and how many splits it has."""
    first_splits, first_counted, first_full = splits_of(
        lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
        capacity, window_left, window_right, num_splits, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
        FIXED, VIA,
    )  # fmt: skip
    total = tl.sum(first_counted, 0)
    for begin in range(runs.BATCH, batch, runs.BATCH):
        _, counted, _ = splits_of(
            begin + lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT, FIXED, VIA,
        )  # fmt: skip
        total += tl.sum(counted, 0)
    start, stop = border(run, num_runs, total), border(run + 1, num_runs, total)

    sequence, split, left, seen = between(start, stop, 0, first_splits, first_counted, first_full)
    for begin in range(runs.BATCH, batch, runs.BATCH):
        splits, counted, full = splits_of(
            begin + lanes, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT, FIXED, VIA,
        )  # fmt: skip
        more, more_split, more_left, more_seen = between(start, stop, seen, splits, counted, full)
        sequence, split, left, seen = sequence + more, split + more_split, left + more_left, seen + more_seen
    return sequence, split, left


@triton.jit
def find_early(
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
    lanes: tl.tensor,  # 0 to runs.BATCH
    few: tl.tensor,  # 0 to runs.FEW
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    FIXED: tl.constexpr,
    VIA: tl.constexpr,
) -> tl.tuple:
    """As :func:`find`, by lengths that may yet change."""
    if batch <= runs.FEW:
        splits, counted, full = splits_of(
            few, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
            capacity, window_left, window_right, num_splits, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
            FIXED, VIA,
        )  # fmt: skip
        total = tl.sum(counted, 0)
        start, stop = border(run, num_runs, total), border(run + 1, num_runs, total)
        sequence, split, left, _ = between(start, stop, 0, splits, counted, full)
    else:
        sequence, split, left = find(
            run, num_runs, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
            new_tokens, capacity, window_left, window_right, num_splits, lanes, GROUP, BLOCK_M, BLOCK_N,
            BOUND_LEFT, BOUND_RIGHT, FIXED, VIA,
        )  # fmt: skip
    return sequence, split, left
