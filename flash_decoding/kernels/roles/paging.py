"""Loading from pages: which threads copy what, so that each looks up few of them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.gluon_names import async_load


@gluon.constexpr_function
def pages_of(keys: int, page_size: int) -> int:
    """Pages that a tile of so many keys lies in, each with as many of them: 1 where a page holds more."""
    return keys // page_size if 0 < page_size < keys else 1


@gluon.constexpr_function
def paged_threads_of(pages: int, slots: int, columns: int, bits: int, warps: int) -> gl.BlockedLayout:
    """The same of a tile (pages, slots of each, columns): as many neighbouring slots for a thread as can be.

    So a thread looks up few pages, one in most cases.
    """
    wide = 128 // bits
    along = min(ring.WARP.value, columns // wide)
    beside = ring.WARP.value // along
    each = max(1, pages * slots // (beside * warps))
    in_page = min(each, slots)
    lanes = min(beside, slots // in_page)
    warps_in_page = min(warps, slots // (in_page * lanes))
    return gl.BlockedLayout(
        [max(1, each // slots), in_page, wide],
        [beside // lanes, lanes, along],
        [warps // warps_in_page, warps_in_page, 1],
        [2, 1, 0],
    )


@gluon.jit
def look_up(
    table_ptr: gl.tensor,
    start: gl.tensor,
    hi: gl.tensor,
    pool_pages: gl.tensor,
    PAGE_SIZE: gl.constexpr,
    PAGES: gl.constexpr,
    threads: gl.constexpr,
) -> gl.tensor:
    """Pages, int64, of the tile from slot ``start`` on, kept inside the pool; from ``hi`` on none is read."""
    numbers = start // PAGE_SIZE + gl.arange(0, PAGES, gl.SliceLayout(1, gl.SliceLayout(2, threads)))
    entries = gl.load(table_ptr + numbers, mask=numbers * PAGE_SIZE < hi, other=0)
    return gl.minimum(gl.maximum(entries, 0), pool_pages - 1).to(gl.int64)


@gluon.jit
def copy_pages(
    base_ptr: gl.tensor,
    strides: gl.tuple,
    pages: gl.tensor,
    start: gl.tensor,
    lo: gl.tensor,
    hi: gl.tensor,
    into: gl.tuple,
    COLS: gl.constexpr,
    BLOCK_COLS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    threads: gl.constexpr,
) -> None:
    """As :func:`loading.copy_tile`, from pages."""
    PAGES: gl.constexpr = pages_of(BLOCK_N, PAGE_SIZE)
    SLOTS: gl.constexpr = BLOCK_N // PAGES
    buffer, full, free, parity = into
    of_page = gl.arange(0, SLOTS, gl.SliceLayout(0, gl.SliceLayout(2, threads)))
    page = gl.arange(0, PAGES, gl.SliceLayout(1, gl.SliceLayout(2, threads)))
    cols = gl.arange(0, BLOCK_COLS, gl.SliceLayout(0, gl.SliceLayout(0, threads)))
    slots = start + (page * SLOTS)[:, None] + of_page[None, :]
    live = gl.expand_dims((slots >= lo) & (slots < hi), 2)
    if COLS != BLOCK_COLS:
        live &= gl.expand_dims((cols < COLS)[None, :], 0)
    inside = (start % PAGE_SIZE + of_page).to(gl.int64)
    rows = (pages * strides[0])[:, None] + (inside * strides[1])[None, :]
    source = base_ptr + (gl.expand_dims(rows, 2) + gl.expand_dims(cols[None, :], 0))
    mbarrier.wait(free, parity ^ 1)
    async_load(buffer.reshape([PAGES, SLOTS, BLOCK_COLS]), source, mask=live)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def load_pages(
    cache: gl.tuple,
    head_kv: gl.tensor,
    tiles: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    turn: gl.tensor,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """As :func:`loading.load_part`, from pages.

    Those of a tile are looked up while the one before is on its way.
    """
    k_ptr, v_ptr, k_strides, v_strides, _, _, block_table_ptr, table_stride, pool_pages = cache
    cache_row, lo, hi, first, step, count = tiles
    head = head_kv.to(gl.int64)
    k_base, v_base = k_ptr + head * k_strides[2], v_ptr + head * v_strides[2]
    PAGES: gl.constexpr = pages_of(BLOCK_N, PAGE_SIZE)
    bits: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth
    k_threads: gl.constexpr = paged_threads_of(PAGES, BLOCK_N // PAGES, BLOCK_D, bits, LOADERS)
    v_threads: gl.constexpr = paged_threads_of(PAGES, BLOCK_N // PAGES, BLOCK_DV, bits, LOADERS)
    table_ptr = block_table_ptr + cache_row * table_stride
    start = first * BLOCK_N
    k_pages = look_up(table_ptr, start, hi, pool_pages, PAGE_SIZE, PAGES, k_threads)
    v_pages = look_up(table_ptr, start, hi, pool_pages, PAGE_SIZE, PAGES, v_threads)
    for i in range(count):
        k_into, v_into = ring.at(k_ring, turn + i, STAGES), ring.at(v_ring, turn + i, STAGES)
        copy_pages(
            k_base,
            k_strides,
            k_pages,
            start,
            lo,
            hi,
            k_into,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            PAGE_SIZE,
            k_threads,
        )
        copy_pages(
            v_base, v_strides, v_pages, start, lo, hi, v_into, HEAD_DIM_V, BLOCK_DV, BLOCK_N, PAGE_SIZE,
            v_threads,
        )  # fmt: skip
        start += step * BLOCK_N
        k_pages = look_up(table_ptr, start, hi, pool_pages, PAGE_SIZE, PAGES, k_threads)
        v_pages = look_up(table_ptr, start, hi, pool_pages, PAGE_SIZE, PAGES, v_threads)
