"""Which keys a program reads: lengths from the device, windows, and the share of one split.

The attention kernel and the combine kernel both ask here, so they agree on how many splits are live without
a word between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding import spec
from flash_decoding.kernels.load import VIA_L1

if TYPE_CHECKING:
    from flash_decoding.spec import Options

FIXED_SPLITS = tl.constexpr(spec.FIXED_SPLITS)


def bounds(options: Options, q_len: int) -> dict[str, bool]:
    """Which sides of the window a kernel has to mask, as its compile-time arguments.

    A right bound that no row reaches is left out: causal attention of one token is no mask at all.
    """
    return {
        "BOUND_LEFT": options.window_left >= 0,
        "BOUND_RIGHT": 0 <= options.window_right < q_len - 1,
    }


@triton.jit
def query_span(b: tl.tensor, cu_seqlens_q_ptr: tl.tensor, q_len: tl.tensor) -> tl.tuple:
    """First token of sequence b in the flattened queries, and how many it has."""
    if cu_seqlens_q_ptr is None:
        start, length = b.to(tl.int64) * q_len, q_len
    else:
        first = tl.load(cu_seqlens_q_ptr + b)
        start = first.to(tl.int64)
        length = tl.minimum(tl.load(cu_seqlens_q_ptr + b + 1) - first, q_len)
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
        first = tl.zeros_like(end)
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
def share(
    lo: tl.tensor, hi: tl.tensor, num_splits: tl.tensor, split_tiles: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tuple:
    """Who has what of the tiles of [lo, hi), which start at multiples of BLOCK_N: so one lies inside one page
    wherever pages are that large.

    Args:
        lo: first slot that is seen.
        hi: where they end.
        num_splits: how many splits scratch has room for; never are there more, whatever the lengths say.
        split_tiles: > 0 fixes the size of a split, for the most tiles that a few splits can have: see
            :func:`fixed_size`. 0 lets as many splits as there are share the tiles.

    Returns:
        The first tile, how many there are, the tiles of a split where they are fixed (else 0), and how many
        splits have any (at least one).
    """
    origin = lo // BLOCK_N
    tiles = tl.where(hi > lo, tl.cdiv(hi, BLOCK_N) - origin, 0)
    size = fixed_size(tiles, split_tiles)
    live = tl.minimum(tl.where(size > 0, tl.cdiv(tiles, tl.maximum(size, 1)), tiles), num_splits)
    return origin, tiles, size, tl.maximum(live, 1)


@triton.jit
def fixed_size(tiles: tl.tensor, split_tiles: tl.tensor) -> tl.tensor:
    """Tiles of a split whose size is fixed by the tiles that its row tile sees, and by nothing else; or 0.

    ``split_tiles``, unless these would be more than FIXED_SPLITS: what is added up in the end stays little.
    """
    return tl.where(split_tiles > 0, tl.maximum(split_tiles, tl.cdiv(tiles, FIXED_SPLITS)), 0)


@triton.jit
def fixed_hand_of(split: tl.tensor, origin: tl.tensor, tiles: tl.tensor, size: tl.tensor) -> tl.tuple:
    """Tiles of a split of a fixed size: the first, and how many; none beyond the last."""
    first = tl.minimum(split * size, tiles)
    return origin + first, tl.minimum(tiles - first, size)


@triton.jit
def hand_of(
    split: tl.tensor,
    origin: tl.tensor,
    tiles: tl.tensor,
    size: tl.tensor,
    live_splits: tl.tensor,
    PAGED: tl.constexpr,
) -> tl.tuple:
    """A live split's tiles: the first, the step from each to the next, and how many.

    Those of a contiguous cache are dealt out like cards: what programs read at the same time lies together
    in memory then, which is faster than as many streams far apart. Pages lie anywhere, so their tiles stay
    in a row; so do those of splits of a fixed size, for the order in which keys are added up to be their own.
    """
    fixed = size > 0
    if PAGED:
        first = tl.where(fixed, split * size, split * tiles // live_splits)
        end = tl.where(fixed, first + size, (split + 1) * tiles // live_splits)
        step = 1
        count = tl.maximum(tl.minimum(end, tiles) - first, 0)
    else:
        first = tl.where(fixed, split * size, split)
        step = tl.where(fixed, 1, live_splits)
        left = tl.maximum(tiles - first, 0)
        count = tl.where(fixed, tl.minimum(left, size), tl.cdiv(left, live_splits))
    return origin + first, step, count


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
