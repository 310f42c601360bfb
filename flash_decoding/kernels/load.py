"""One way to address a cache: contiguous, or paged with pages of any size."""

from __future__ import annotations

import triton
import triton.language as tl

VIA_L1 = tl.constexpr("")
VIA_L2 = tl.constexpr(".cg")
"""Ways of a load. What comes by the first may be found again in the multiprocessor's own cache, which does
not notice when others write; the second leaves nothing there."""


@triton.jit
def cache_row(
    b: tl.tensor, cache_batch_idx_ptr: tl.tensor, rows: tl.tensor, VIA: tl.constexpr = VIA_L1
) -> tl.tensor:
    """Row of the cache (or of block_table) that sequence b uses, kept inside [0, rows)."""
    row = b
    if cache_batch_idx_ptr is not None:
        row = tl.minimum(tl.maximum(tl.load(cache_batch_idx_ptr + b, cache_modifier=VIA), 0), rows - 1)
    return row.to(tl.int64)


@triton.jit
def place(
    row: tl.tensor,
    start: tl.tensor,
    lanes: tl.tensor,
    end: tl.tensor,
    block_table_ptr: tl.tensor,
    table_stride: tl.tensor,
    pages: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VIA: tl.constexpr = VIA_L1,
) -> tl.tuple:
    """(page, first, more): slots ``start + lanes`` are ``first + more`` in their pages, all of it int64.

    A contiguous cache is one page per sequence. Where a tile cannot straddle pages its page is a scalar: one
    table entry to load instead of BLOCK_N. Entries of slots from ``end`` on are not read, and what is read
    is kept inside the pool.
    """
    if PAGE_SIZE == 0:
        page, first, more = row, start.to(tl.int64), lanes
    else:
        table = block_table_ptr + row * table_stride
        if PAGE_SIZE % BLOCK_N == 0:
            entry = tl.load(table + start // PAGE_SIZE, cache_modifier=VIA)
            first, more = (start % PAGE_SIZE).to(tl.int64), lanes
        elif BLOCK_N % PAGE_SIZE == 0:
            numbers = start // PAGE_SIZE + tl.arange(0, BLOCK_N // PAGE_SIZE)
            entry = tl.load(table + numbers, mask=numbers * PAGE_SIZE < end, other=0, cache_modifier=VIA)
            entry = tl.broadcast_to(entry[:, None], (BLOCK_N // PAGE_SIZE, PAGE_SIZE)).reshape(BLOCK_N)
            first, more = tl.cast(0, tl.int64), lanes % PAGE_SIZE
        else:
            slots = start + lanes
            entries = table + slots // PAGE_SIZE
            entry = tl.load(entries, mask=slots < end, other=0, cache_modifier=VIA)
            first, more = tl.cast(0, tl.int64), slots % PAGE_SIZE
        page = tl.minimum(tl.maximum(entry, 0), pages - 1).to(tl.int64)
    return page, first, tl.cast(more, tl.int64)


@triton.jit
def load_tile(
    base_ptr: tl.tensor,
    page: tl.tensor,
    first: tl.tensor,
    more: tl.tensor,
    live: tl.tensor,
    strides: tl.tuple,
    SLOT: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> tl.tensor:
    """(keys, BLOCK_COLS) of keys or values; dead slots and padding columns read as 0: no 0 * NaN.

    Where the stride of a slot is compiled in, the addresses of a thread differ by constants: it computes one.
    """
    cols = tl.arange(0, BLOCK_COLS)
    rows = base_ptr + (page * strides[0] + first * strides[1]) + more * (SLOT if SLOT > 0 else strides[1])
    mask = live[:, None]
    if COLS != BLOCK_COLS:
        mask &= (cols < COLS)[None, :]
    return tl.load(rows[:, None] + cols[None, :], mask=mask, other=0.0)
