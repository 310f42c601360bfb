"""The loaders: tiles of keys and values from the cache into the rings, as fast as buffers become free."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flash_decoding.kernels import overlap
from flash_decoding.kernels.roles import paging, ring
from flash_decoding.kernels.roles.gluon_names import async_load


@gluon.constexpr_function
def threads_of(columns: int, bits: int, warps: int) -> gl.BlockedLayout:
    """Which thread copies what of a tile (keys, columns): 16 bytes each, neighbours along a key."""
    wide = 128 // bits
    along = min(ring.WARP.value, columns // wide)
    return gl.BlockedLayout([1, wide], [ring.WARP.value // along, along], [warps, 1], [1, 0])


UNIT = gl.constexpr(16)
"""Elements of which every stride of a cache is a multiple (the planner sees to it): told in units of it,
where something lies tells the compiler how it is aligned."""


@gluon.jit
def places_of(
    strides: gl.tuple,
    cache_row: gl.tensor,
    head_kv: gl.tensor,
    start: gl.tensor,
    BLOCK_N: gl.constexpr,
    threads: gl.constexpr,
) -> gl.tensor:
    """Where keys (or values) from slot ``start`` on lie in a contiguous cache, in UNITs."""
    slots = start + gl.arange(0, BLOCK_N, gl.SliceLayout(1, threads))
    row = cache_row * (strides[0] // UNIT) + head_kv.to(gl.int64) * (strides[2] // UNIT)
    return row + slots.to(gl.int64) * (strides[1] // UNIT)


@gluon.jit
def copy_tile(
    base_ptr: gl.tensor,
    places: gl.tensor,
    start: gl.tensor,
    lo: gl.tensor,
    hi: gl.tensor,
    into: gl.tuple,
    COLS: gl.constexpr,
    BLOCK_COLS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    threads: gl.constexpr,
) -> None:
    """Start the copy of slots from ``start`` on when the buffer is free; dead ones become 0: no 0 * NaN."""
    buffer, full, free, parity = into
    slots = start + gl.arange(0, BLOCK_N, gl.SliceLayout(1, threads))
    cols = gl.arange(0, BLOCK_COLS, gl.SliceLayout(0, threads))
    live = ((slots >= lo) & (slots < hi))[:, None]
    if COLS != BLOCK_COLS:
        live &= (cols < COLS)[None, :]
    source = base_ptr + (places * UNIT)[:, None] + cols[None, :]
    mbarrier.wait(free, parity ^ 1)
    async_load(buffer, source, mask=live)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.constexpr_function
def keys_of_thread(keys: int, columns: int, bits: int, warps: int) -> int:
    """How many keys of a tile a thread copies something of."""
    beside = ring.WARP.value // min(ring.WARP.value, columns * bits // 128)
    return int(max(1, keys // (beside * warps)))


@gluon.constexpr_function
def waiting_with(count: int) -> str:
    """Assembly as that of :func:`overlap.wait_knowing`, for so many numbers, which gives them back.

    The compiler cannot tell that they are the same, and so does not compute them again.
    """
    taken = [f"${count + i}" for i in range(count)]
    look = [f"or.b64 %all, %all, {number};" for number in taken[1:]]
    give = [f"mov.b64 ${i}, {number};" for i, number in enumerate(taken)]
    lines = [".reg .pred %any;", ".reg .b64 %all;", f"mov.b64 %all, {taken[0]};", *look]
    return "\n".join(["{", *lines, "setp.ne.s64 %any, %all, -1;", "@%any griddepcontrol.wait;", *give, "}"])


@gluon.constexpr_function
def operands(count: int) -> str:
    """Constraints of that."""
    return ",".join(["=&l"] * count + ["l"] * count)


@gluon.jit
def wait_with(k_places: gl.tensor, v_places: gl.tensor, PACK: gl.constexpr) -> gl.tuple:
    """Wait for the kernel before, with the places of PACK keys and values of each thread computed by then."""
    return gl.inline_asm_elementwise(
        waiting_with(2 * PACK),
        operands(2 * PACK),
        [k_places, v_places],
        dtype=(gl.int64, gl.int64),
        is_pure=False,
        pack=PACK,
    )


@gluon.jit
def load_tiles(
    cache: gl.tuple,
    head_kv: gl.tensor,
    tiles: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    turn: gl.tensor,
    begin: gl.tensor,
    end: gl.tensor,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
    WAITS: gl.constexpr,
) -> None:
    """As :func:`load_part`, from a contiguous cache.

    Where it WAITS for the kernel before, it knows by then where the first tile lies.
    """
    k_ptr, v_ptr, k_strides, v_strides, _, _, _, _, _ = cache
    cache_row, lo, hi, first, step, _ = tiles
    bits: gl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth
    k_threads: gl.constexpr = threads_of(BLOCK_D, bits, LOADERS)
    v_threads: gl.constexpr = threads_of(BLOCK_DV, bits, LOADERS)
    start = (first + begin * step) * BLOCK_N
    k_places = places_of(k_strides, cache_row, head_kv, start, BLOCK_N, k_threads)
    v_places = places_of(v_strides, cache_row, head_kv, start, BLOCK_N, v_threads)
    if WAITS:
        if BLOCK_D == BLOCK_DV:
            k_places, v_places = wait_with(
                k_places, v_places, keys_of_thread(BLOCK_N, BLOCK_D, bits, LOADERS)
            )
        else:
            overlap.wait_for_the_kernel_before()
    k_step = (step * BLOCK_N).to(gl.int64) * (k_strides[1] // UNIT)
    v_step = (step * BLOCK_N).to(gl.int64) * (v_strides[1] // UNIT)
    for i in range(begin, end):
        k_into, v_into = ring.at(k_ring, turn + i, STAGES), ring.at(v_ring, turn + i, STAGES)
        if IN_FLIGHT < STAGES:
            ring.wait_until_loaded(k_ring, turn + i - IN_FLIGHT, STAGES)
        copy_tile(k_ptr, k_places, start, lo, hi, k_into, HEAD_DIM, BLOCK_D, BLOCK_N, k_threads)
        if IN_FLIGHT < STAGES:
            ring.wait_until_loaded(v_ring, turn + i - IN_FLIGHT, STAGES)
        copy_tile(v_ptr, v_places, start, lo, hi, v_into, HEAD_DIM_V, BLOCK_DV, BLOCK_N, v_threads)
        start += step * BLOCK_N
        k_places += k_step
        v_places += v_step


@gluon.jit
def load_part(
    cache: gl.tuple,
    head_kv: gl.tensor,
    tiles: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    turn: gl.tensor,
    begin: gl.tensor,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Load the tiles of a part into the rings, where its first one comes at ``turn``.

    Of a contiguous cache those before ``begin`` are there already.
    """
    if PAGE_SIZE == 0:
        load_tiles(
            cache, head_kv, tiles, k_ring, v_ring, turn, begin, tiles[5], HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, STAGES, IN_FLIGHT, LOADERS, False,
        )  # fmt: skip
    else:
        paging.load_pages(
            cache, head_kv, tiles, k_ring, v_ring, turn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
            PAGE_SIZE, STAGES, LOADERS,
        )  # fmt: skip


@gluon.jit
def load_first(
    cache: gl.tuple,
    head_kv: gl.tensor,
    expected: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
) -> gl.tensor:
    """Wait for the kernel before, then load as many of the tiles expected as there are buffers for.

    Returns:
        How many.
    """
    given = gl.minimum(expected[5], IN_FLIGHT)
    load_tiles(
        cache, head_kv, expected, k_ring, v_ring, 0, 0, given, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
        BLOCK_N, STAGES, IN_FLIGHT, LOADERS, True,
    )  # fmt: skip
    return given
