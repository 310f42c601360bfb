"""What a program can do before it may read: reckon with what it will find, and ask for it.

A program in place early (:mod:`~flash_decoding.kernels.overlap`) reads the lengths past the multiprocessor's
own cache and takes them for what they will be. So it knows its first tiles before it has to wait, has them on
their way into the L2 cache, and its loaders start as soon as they may, without another look at a length. The
kernel before may yet change one. So each role looks again when it may, and where the first tiles are others
than expected, the loaders load again and the multipliers let go what came in vain.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import ahead, load
from flash_decoding.kernels.load import VIA_L2
from flash_decoding.kernels.roles import ring

ASKERS = gl.constexpr(gl.BlockedLayout([1, 1], [16, 2], [4, 1], [1, 0]))
"""Which thread asks for which line of which key."""


@gluon.jit
def lines_of(base_ptr: gl.tensor, BLOCK_COLS: gl.constexpr) -> gl.tensor:
    """As :func:`load.lines_of`, laid out for those who ask."""
    bits: gl.constexpr = BLOCK_COLS * base_ptr.dtype.element_ty.primitive_bitwidth
    count: gl.constexpr = (bits + load.LINE_BITS - 1) // load.LINE_BITS
    return gl.arange(0, count, gl.SliceLayout(0, ASKERS))


@gluon.jit
def ask(
    cache: gl.tuple,
    head_kv: gl.tensor,
    tiles: gl.tuple,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
) -> None:
    """Ask for the first tile, as much of it as :func:`ahead.ask_for` does."""
    k_ptr, v_ptr, k_strides, v_strides, _, _, block_table_ptr, table_stride, pool_pages = cache
    cache_row, _, hi, first, _, count = tiles
    if count > 0:
        start = first * BLOCK_N
        lanes = gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, ASKERS)), hi - 1 - start)
        page, slot = load.place(
            cache_row, start, lanes, hi, block_table_ptr, table_stride, pool_pages, PAGE_SIZE, BLOCK_N, VIA_L2
        )
        ahead.ask_for(
            k_ptr, v_ptr, k_strides, v_strides, page, slot, head_kv, lines_of(k_ptr, BLOCK_D),
            lines_of(v_ptr, BLOCK_DV), HEAD_DIM, HEAD_DIM_V,
        )  # fmt: skip


@gluon.jit
def ask_for_queries(
    queries: gl.tuple,
    b: gl.tensor,
    row: gl.tensor,
    head_kv: gl.tensor,
    q_start: gl.tensor,
    q_len: gl.tensor,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr,
) -> None:
    """:func:`ahead.ask_for_queries`, for a tile of rows."""
    q_ptr, strides, cu_seqlens_q_ptr = queries
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, ASKERS))
    ahead.ask_for_queries(
        q_ptr, strides, cu_seqlens_q_ptr, b, rows, head_kv, q_start, q_len, lines_of(q_ptr, BLOCK_D), GROUP,
        HEAD_DIM,
    )  # fmt: skip


@gluon.jit
def kept_of(given: gl.tensor, tiles: gl.tuple, expected: gl.tuple) -> gl.tensor:
    """Of the tiles that were loaded by expectation, how many are what they should be: all or none."""
    same = tiles[0] == expected[0]
    for i in gl.static_range(1, 6):
        same &= tiles[i] == expected[i]
    return gl.where(same, given, 0)


@gluon.jit
def let_go(k_ring: gl.tuple, v_ring: gl.tuple, count: gl.tensor, STAGES: gl.constexpr) -> None:
    """Take the first ``count`` tiles out of the rings without a look at them."""
    for i in range(count):
        ring.drop(k_ring, i, STAGES)
        ring.drop(v_ring, i, STAGES)
