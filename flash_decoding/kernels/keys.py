"""Which keys a program reads: lengths from the device, windows, and the share of one split.

The attention kernel and the combine kernel both ask here, so they agree on how many splits are live without
a word between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

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
) -> tl.tuple:
    """[first, end) of the slots that sequence b owns; never outside the cache, whatever the lengths say."""
    end = tl.minimum(tl.maximum(tl.load(cache_seqlens_ptr + b), 0) + new_tokens, capacity)
    if cache_leftpad_ptr is None:
        first = tl.zeros_like(end)
    else:
        first = tl.maximum(tl.load(cache_leftpad_ptr + b), 0)
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
) -> tl.tuple:
    """End of the slots of sequence b, and [lo, hi) of those that the row tile from ``row`` on sees."""
    first, end = live_slots(b, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity)
    lo, hi = visible_slots(
        row, q_len, first, end, window_left, window_right, GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT
    )
    return end, lo, hi


@triton.jit
def share(
    lo: tl.tensor, hi: tl.tensor, num_splits: tl.tensor, split_tiles: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tuple:
    """Tiles of [lo, hi), tiles per split, and the number of splits that have any (at least one).

    Tiles start at multiples of BLOCK_N, so that a tile lies inside one page wherever pages are that large.
    ``split_tiles`` > 0 fixes the size of a split; otherwise the live tiles are shared out evenly.
    """
    origin = lo // BLOCK_N
    tiles = tl.where(hi > lo, tl.cdiv(hi, BLOCK_N) - origin, 0)
    per_split = tl.where(split_tiles > 0, split_tiles, tl.cdiv(tiles, num_splits))
    per_split = tl.maximum(per_split, 1)
    return origin, tiles, per_split, tl.maximum(tl.cdiv(tiles, per_split), 1)


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
