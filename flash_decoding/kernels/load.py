"""One way to address a cache: contiguous, or paged with pages of any size; and to ask for what it has."""

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
    """(page, slot in the page) of slots ``start + lanes``, int64; times two strides they are an address.

    A contiguous cache is one page per sequence. Where a tile cannot straddle pages its page is a scalar: one
    table entry to load instead of BLOCK_N. Entries of slots from ``end`` on are not read, and what is read
    is kept inside the pool.
    """
    if PAGE_SIZE == 0:
        page, slot = row, start.to(tl.int64) + lanes
    else:
        table = block_table_ptr + row * table_stride
        if PAGE_SIZE % BLOCK_N == 0:
            entry = tl.load(table + start // PAGE_SIZE, cache_modifier=VIA)
            slot = (start % PAGE_SIZE).to(tl.int64) + lanes
        else:
            slots = start + lanes
            entries = table + slots // PAGE_SIZE
            entry = tl.load(entries, mask=slots < end, other=0, cache_modifier=VIA)
            slot = (slots % PAGE_SIZE).to(tl.int64)
        page = tl.minimum(tl.maximum(entry, 0), pages - 1).to(tl.int64)
    return page, slot


@triton.jit
def load_tile(
    base_ptr: tl.tensor,
    page: tl.tensor,
    slot: tl.tensor,
    live: tl.tensor,
    strides: tl.tuple,
    COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
) -> tl.tensor:
    """(keys, BLOCK_COLS) of keys or values; dead slots and padding columns read as 0: no 0 * NaN."""
    cols = tl.arange(0, BLOCK_COLS)
    rows = page * strides[0] + slot * strides[1]
    mask = live[:, None]
    if COLS != BLOCK_COLS:
        mask &= (cols < COLS)[None, :]
    return tl.load(base_ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0)


LINE_BITS = tl.constexpr(1024)
"""A line of the L2 cache."""


@triton.jit
def lines_of(base_ptr: tl.tensor, BLOCK_COLS: tl.constexpr) -> tl.tensor:
    """0 to the lines that so many elements lie in."""
    bits: tl.constexpr = BLOCK_COLS * base_ptr.dtype.element_ty.primitive_bitwidth
    return tl.arange(0, (bits + LINE_BITS - 1) // LINE_BITS)


@triton.jit
def prefetch(base_ptr: tl.tensor, rows: tl.tensor, lines: tl.tensor, COLS: tl.constexpr) -> None:
    """Ask for some lines of each of ``base_ptr + rows`` to come into the L2 cache.

    Args:
        base_ptr: where row 0 begins.
        rows: offsets of the rows, in elements.
        lines: as by :func:`lines_of`; none of them is taken to begin beyond COLS elements.
        COLS: elements of a row.
    """
    tl.static_assert(len(lines.shape) == 1, "lines come from lines_of: a number would pass for one of them")
    line: tl.constexpr = LINE_BITS // base_ptr.dtype.element_ty.primitive_bitwidth
    cols = tl.minimum(lines * line, COLS - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [base_ptr + rows[:, None] + cols[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
