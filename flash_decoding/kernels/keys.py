"""Which keys a program reads: lengths from the device, windows, and the share of one split.

The attention kernel and the combine kernel both ask here, so they agree on how many splits are live without
a word between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import fixed_sizes
from flash_decoding.kernels.load import VIA_L1

if TYPE_CHECKING:
    from flash_decoding.spec import Options


def bounds(options: Options, q_len: int) -> dict[str, bool]:
    """Which sides of the window a kernel has to mask, as its compile-time arguments.

    A right bound that no row reaches is left out: causal attention of one token is no mask at all.
    """
    return {
        "BOUND_LEFT": options.window_left >= 0,
        "BOUND_RIGHT": 0 <= options.window_right < q_len - 1,
    }


@triton.jit
def query_span(
    b: tl.tensor, cu_seqlens_q_ptr: tl.tensor, q_len: tl.tensor, VIA: tl.constexpr = VIA_L1
) -> tl.tuple:
    """First token of sequence b in the flattened queries, and how many it has."""
    if cu_seqlens_q_ptr is None:
        start, length = b.to(tl.int64) * q_len, q_len
    else:
        first = tl.load(cu_seqlens_q_ptr + b, cache_modifier=VIA)
        start = first.to(tl.int64)
        stop = tl.load(cu_seqlens_q_ptr + b + 1, cache_modifier=VIA)
        length = tl.minimum(stop - first, q_len)
    return start, length


@triton.jit
def live_slots(
    b: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """[first, end) of the slots that sequence b owns; never outside the cache, whatever the lengths say."""
    length = tl.load(cache_seqlens_ptr + b, cache_modifier=VIA)
    end = tl.minimum(tl.maximum(length, 0) + new_tokens, capacity)
    if cache_leftpad_ptr is None:
        first = end * 0  # of its shape, in both of Triton's languages
    else:
        first = tl.maximum(tl.load(cache_leftpad_ptr + b, cache_modifier=VIA), 0)
    return first, end


@triton.jit
def visible_slots(
    row: tl.tensor,
    q_len: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """[lo, hi) of the slots that any of the BLOCK_M rows from ``row`` on can see."""
    shift = end - q_len
    lo, hi = first, end
    if BOUND_LEFT:
        lo = tl.maximum(lo, shift + row // GROUP - window_left)
    if BOUND_RIGHT:
        last_token = tl.minimum((row + BLOCK_M - 1) // GROUP, q_len - 1)
        hi = tl.minimum(hi, shift + last_token + window_right + 1)
    return lo, hi


@triton.jit
def seen_by(
    b: tl.tensor,
    row: tl.tensor,
    q_len: tl.tensor,
    cache_seqlens_ptr: tl.tensor,
    cache_leftpad_ptr: tl.tensor,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """End of the slots of sequence b, and [lo, hi) of those that the row tile from ``row`` on sees."""
    first, end = live_slots(b, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, VIA)
    lo, hi = visible_slots(
        row, q_len, first, end, window_left, window_right, GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT
    )
    return end, lo, hi


@triton.jit
def seen_tiles(lo: tl.tensor, hi: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tuple:
    """First tile of [lo, hi), and how many there are.

    They start at multiples of BLOCK_N, so that a tile lies inside one page wherever pages are that large.
    """
    origin = lo // BLOCK_N
    return origin, tl.where(hi > lo, tl.cdiv(hi, BLOCK_N) - origin, 0)


@triton.jit
def live_splits(tiles: tl.tensor, num_splits: tl.tensor) -> tl.tensor:
    """How many of the splits that share so many tiles have any (at least one)."""
    return tl.maximum(tl.minimum(tiles, num_splits), 1)


@triton.jit
def hand_of(
    split: tl.tensor, origin: tl.tensor, tiles: tl.tensor, live: tl.tensor, PAGED: tl.constexpr
) -> tl.tuple:
    """A live split's tiles: the first, the step from each to the next, and how many.

    Those of a contiguous cache are dealt out like cards: what programs read at the same time lies together
    in memory then, which is faster than as many streams far apart. Pages lie anywhere, so their tiles stay
    in a row.
    """
    if PAGED:
        first = split * tiles // live
        step = 1
        count = tl.maximum((split + 1) * tiles // live - first, 0)
    else:
        first = split
        step = live
        count = tl.cdiv(tl.maximum(tiles - split, 0), live)
    return origin + first, step, count


@triton.jit
def part_of(
    part: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    num_parts: tl.tensor,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    FIXED: tl.constexpr,
) -> tl.tuple:
    """What a program has of [lo, hi): its first tile, the step to the next, how many, of how many each leaf
    has (0 where there are none), and how many parts live.

    Sizes may be FIXED (:mod:`~flash_decoding.kernels.fixed_sizes`). Else as many splits as there are share
    the tiles.
    """
    origin, tiles = seen_tiles(lo, hi, BLOCK_N)
    first, step, count, leaf, live = origin, 1, tiles, 0, 1
    if FIXED[0] > 0:
        size = fixed_sizes.sizes(tiles, FIXED)
        leaf = size[4]
        if IS_SPLIT:
            first, step, count = fixed_sizes.hand_of(part, origin, size, PAGED, FIXED)
            live = fixed_sizes.parts_of(size, num_parts, FIXED)
    elif IS_SPLIT:
        live = live_splits(tiles, num_parts)
        first, step, count = hand_of(part, origin, tiles, live, PAGED)
    return first, step, count, leaf, live


@triton.jit
def exist(
    key_mask_ptr: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    b: tl.tensor,
    slots: tl.tensor,
    live: tl.tensor,
) -> tl.tensor:
    """Which of the slots the key mask leaves to sequence b; of those that are not live it is not read."""
    row = key_mask_ptr + tl.cast(b, tl.int64) * stride
    return tl.load(row + slots, mask=live & (slots < columns), other=0) != 0


@triton.jit
def row_sees(
    slots: tl.tensor,
    live: tl.tensor,
    position: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tensor:
    """Mask (rows, keys): the slot is alive and inside the row's window."""
    sees = live[None, :]
    if BOUND_LEFT:
        sees &= slots[None, :] >= (position - window_left)[:, None]
    if BOUND_RIGHT:
        sees &= slots[None, :] <= (position + window_right)[:, None]
    return sees


@triton.jit
def seen_by_all(
    position: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    window_left: tl.tensor,
    window_right: tl.tensor,
    BOUND_LEFT: tl.constexpr,
    BOUND_RIGHT: tl.constexpr,
) -> tl.tuple:
    """[first, last) of the slots that every row of a tile sees: tiles inside need no mask."""
    first, last = lo, hi
    if BOUND_LEFT:
        first = tl.maximum(first, tl.max(position, 0) - window_left)
    if BOUND_RIGHT:
        last = tl.minimum(last, tl.min(position, 0) + window_right + 1)
    return first, last
