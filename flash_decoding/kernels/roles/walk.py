"""The way of a program through its work: one part after another, across sequences.

Parts are equal shares of all tiles (:mod:`~flash_decoding.kernels.runs`), or whole splits of a fixed size, or
leaves of such (:mod:`~flash_decoding.kernels.whole`). Loaders and multipliers go the same way, each for
themselves, by the same functions; loaders are ahead.

Where a program is on its way is told by three numbers: of runs the tile counted that the part begins at, its
sequence, and what is counted before that; of fixed sizes the number of the part, its sequence, and how many
parts are left. It goes from sequence to sequence, and in each from part to part. ``FIXED`` is as in
:mod:`~flash_decoding.kernels.fixed_sizes`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import fixed_sizes, keys, load, run_parts, runs, whole
from flash_decoding.kernels.load import VIA_L1
from flash_decoding.kernels.roles import ring
from flash_decoding.kernels.roles.multiplying import MULTIPLIERS

SEQUENCES = gl.constexpr(
    gl.BlockedLayout([runs.BATCH.value // ring.WARP.value], [ring.WARP.value], [MULTIPLIERS.value], [0])
)
"""Which thread looks at which sequence: every warp at all of them, so that none waits for another."""

FEW_SEQUENCES = gl.constexpr(
    gl.BlockedLayout([runs.FEW.value // ring.WARP.value], [ring.WARP.value], [MULTIPLIERS.value], [0])
)
"""The same of no more than are looked at early."""

IN_A_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def tiles_of(
    batch: gl.tensor,
    lengths: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    VIA: gl.constexpr = VIA_L1,
) -> gl.tensor:
    """How many tiles each of the first sequences has, ``runs.BATCH`` of them: all else follows from these."""
    seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, left, right = lengths
    _, tiles = runs.tiles_of(
        gl.arange(0, runs.BATCH, SEQUENCES), batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len,
        new_tokens, capacity, left, right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA,
    )  # fmt: skip
    return tiles


@gluon.jit
def begin(
    where: gl.tuple,
    tiles: gl.tensor,
    lengths: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    FIXED: gl.constexpr,
    VIA: gl.constexpr = VIA_L1,
) -> gl.tuple:
    """Where a program's way begins: the three numbers; and of runs the tiles of one, how many more each
    sequence counts than it has, and where the run ends.
    """
    row, _, run, num_runs, batch, num_parts = where
    seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, left, right = lengths
    lanes = gl.arange(0, runs.BATCH, SEQUENCES)
    few = gl.arange(0, runs.FEW, FEW_SEQUENCES)
    size, extra, stop = 0, 0, 0
    if FIXED[0] > 0:
        if VIA == VIA_L1:
            b, at, before = whole.find(
                run, num_runs, row, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                capacity, left, right, num_parts, lanes, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
                FIXED, VIA,
            )  # fmt: skip
        else:
            b, at, before = whole.find_early(
                run, num_runs, row, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                capacity, left, right, num_parts, lanes, few, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
                BOUND_RIGHT, FIXED, VIA,
            )  # fmt: skip
    else:
        if VIA == VIA_L1:
            b, before, size, all_tiles, extra = runs.find(
                run, num_runs, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                capacity, left, right, lanes, tiles, True, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
            )  # fmt: skip
        else:
            b, before, size, all_tiles, extra = runs.find_early(
                run, num_runs, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                capacity, left, right, lanes, tiles, few, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA,
            )  # fmt: skip
        at = run * size
        stop = gl.minimum(at + size, all_tiles)
    return at, b, before, size, extra, stop


@gluon.jit
def begin_by(
    found: gl.tuple,
    early_tiles: gl.tensor,
    where: gl.tuple,
    lengths: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    FIXED: gl.constexpr,
) -> gl.tuple:
    """As :func:`begin`, by what was found from tiles that could be told early; they are in shared memory.

    It holds, unless the kernel before changed a length.
    """
    batch = where[4]
    tiles = tiles_of(batch, lengths, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT)
    at, b, before, size, extra, stop = found
    if (batch > runs.BATCH) | (gl.max((tiles != early_tiles.load(SEQUENCES)).to(gl.int32), 0) > 0):
        at, b, before, size, extra, stop = begin(
            where, tiles, lengths, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED
        )
    return at, b, before, size, extra, stop


@gluon.jit
def goes_on(at: gl.tensor, before: gl.tensor, stop: gl.tensor, FIXED: gl.constexpr) -> gl.tensor:
    """Whether there is another part."""
    if FIXED[0] > 0:
        result = before > 0
    else:
        result = at < stop
    return result


@gluon.jit
def visit(
    at: gl.tensor,
    b: gl.tensor,
    before: gl.tensor,
    size: gl.tensor,
    extra: gl.tensor,
    stop: gl.tensor,
    where: gl.tuple,
    cache: gl.tuple,
    lengths: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    FIXED: gl.constexpr,
    VIA: gl.constexpr = VIA_L1,
) -> gl.tuple:
    """The sequence that a program is at: as many parts of it as are the program's, one after another.

    Returns:
        Its queries' first token and number; end of its slots; row of the cache and [lo, hi) of slots seen;
        what :func:`part_at` takes; how many parts, and whether one is all there is of the sequence; and the
        two numbers beside the next sequence's own.
    """
    row, _, _, _, batch, num_parts = where
    seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, left, right = lengths
    cache_row = load.cache_row(b, cache[4], cache[5], VIA)
    if FIXED[0] > 0:
        q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len, VIA)
        end, lo, hi = keys.seen_by(
            b, row, q_len, seqlens_ptr, leftpad_ptr, new_tokens, capacity, left, right, GROUP, BLOCK_M,
            BOUND_LEFT, BOUND_RIGHT, VIA,
        )  # fmt: skip
        origin, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
        size = fixed_sizes.sizes(tiles, FIXED)
        all_parts = fixed_sizes.parts_of(size, num_parts, FIXED)
        # a short query may have no rows here: then nothing is read or written
        parts = gl.where(row < q_len * GROUP, gl.minimum(all_parts - at, before), 0)
        hands = (origin, size)
        is_whole = all_parts == 1
        next_at = 0
        next_before = before - parts
    else:
        q_start, q_len, end, lo, hi, first, step, count, next_at, next_before = run_parts.part_at(
            at, b, before, size, extra, stop, row, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, left, right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
            PAGE_SIZE > 0, VIA,
        )  # fmt: skip
        parts = 1
        hands = (first, (step, count, 0, 0, 0))
        is_whole = (at == before) & (next_at == next_before)
    return q_start, q_len, end, (cache_row, lo, hi), hands, parts, is_whole, next_at, next_before


@gluon.jit
def part_at(
    part: gl.tensor,
    before: gl.tensor,
    seen: gl.tuple,
    hands: gl.tuple,
    PAGE_SIZE: gl.constexpr,
    FIXED: gl.constexpr,
) -> gl.tuple:
    """Tiles of a part of the sequence that a program is at, those of a leaf, and whether it is the first."""
    cache_row, lo, hi = seen
    first, size = hands
    if FIXED[0] > 0:
        first, step, count = fixed_sizes.hand_of(part, first, size, PAGE_SIZE > 0, FIXED)
        leaf = size[4]
        is_first = part == 0
    else:
        step, count, leaf, _, _ = size
        is_first = part == before
    return (cache_row, lo, hi, first, step, count), leaf, is_first
