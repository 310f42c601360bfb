"""The way of a program through its work: one part after another, across sequences.

Parts are equal shares of all tiles (:mod:`~flash_decoding.kernels.runs`), or whole splits of a fixed size, or
leaves of such (:mod:`~flash_decoding.kernels.whole`). Loaders and multipliers go the same way, each for
themselves, by the same functions; loaders are ahead.

Where a program is on its way is told by three numbers: of runs the tile counted that the part begins at, its
sequence, and what is counted before that; of fixed sizes the number of the part, its sequence, and how many
parts are left. ``fixed`` is the most parts of a sequence, tiles of a split and of a leaf, and whether leaves
are parts; of runs all of them are None.
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
    fixed: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    VIA: gl.constexpr = VIA_L1,
) -> gl.tuple:
    """Where a program's way begins: the three numbers; and of runs the tiles of one, how many more each
    sequence counts than it has, and where the run ends.
    """
    row, _, run, num_runs, batch = where
    seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, left, right = lengths
    num_parts, split_tiles, leaf_tiles, by_leaf = fixed
    lanes = gl.arange(0, runs.BATCH, SEQUENCES)
    if split_tiles is not None:
        b, at, before = whole.find(
            run, num_runs, row, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
            capacity, left, right, num_parts, split_tiles, leaf_tiles, by_leaf, lanes, GROUP, BLOCK_M,
            BLOCK_N, BOUND_LEFT, BOUND_RIGHT, VIA,
        )  # fmt: skip
        size, extra, stop = 0, 0, 0
    else:
        if VIA == VIA_L1:
            b, before, size, all_tiles, extra = runs.find(
                run, num_runs, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens,
                capacity, left, right, lanes, tiles, True, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
            )  # fmt: skip
        else:
            b, before, size, all_tiles, extra = runs.find_among_few(
                run, num_runs, batch, lanes, tiles, BLOCK_N
            )
        at = run * size
        stop = gl.minimum(at + size, all_tiles)
    return at, b, before, size, extra, stop


@gluon.jit
def begin_by(
    found: gl.tuple,
    early_tiles: gl.tensor,
    where: gl.tuple,
    lengths: gl.tuple,
    fixed: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
) -> gl.tuple:
    """As :func:`begin`, by what was found from tiles that could be told early; they are in shared memory.

    It holds, unless the kernel before changed a length.
    """
    batch = where[4]
    tiles = tiles_of(batch, lengths, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT)
    at, b, before, size, extra, stop = found
    if (batch > runs.BATCH) | (gl.max((tiles != early_tiles.load(SEQUENCES)).to(gl.int32), 0) > 0):
        at, b, before, size, extra, stop = begin(
            where, tiles, lengths, fixed, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT
        )
    return at, b, before, size, extra, stop


@gluon.jit
def goes_on(at: gl.tensor, before: gl.tensor, stop: gl.tensor, fixed: gl.tuple) -> gl.tensor:
    """Whether there is another part."""
    if fixed[1] is not None:
        result = before > 0
    else:
        result = at < stop
    return result


@gluon.jit
def part_at(
    at: gl.tensor,
    b: gl.tensor,
    before: gl.tensor,
    size: gl.tensor,
    extra: gl.tensor,
    stop: gl.tensor,
    where: gl.tuple,
    cache: gl.tuple,
    lengths: gl.tuple,
    fixed: gl.tuple,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    VIA: gl.constexpr = VIA_L1,
) -> gl.tuple:
    """The part that a program is at.

    Returns:
        Its queries' first token and number; end of the sequence's slots; its tiles, those of a leaf, whether
        it is the first of its sequence; and the three numbers of the next part.
    """
    row, _, _, _, batch = where
    seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity, left, right = lengths
    cache_row = load.cache_row(b, cache[4], cache[5], VIA)
    if fixed[1] is not None:
        q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len, VIA)
        end, lo, hi = keys.seen_by(
            b, row, q_len, seqlens_ptr, leftpad_ptr, new_tokens, capacity, left, right, GROUP, BLOCK_M,
            BOUND_LEFT, BOUND_RIGHT, VIA,
        )  # fmt: skip
        origin, tiles = keys.seen_tiles(lo, hi, BLOCK_N)
        part, leaf, parts = fixed_sizes.share(tiles, fixed[0], fixed[1], fixed[2], fixed[3])
        has_rows = row < q_len * GROUP  # a short query may have none here: then nothing is read or written
        first, count = fixed_sizes.hand_of(at, origin, gl.where(has_rows, tiles, 0), part)
        step = 1
        is_first = at == 0
        is_last = (count < part) | (at + 1 >= parts)
        next_at = gl.where(is_last, 0, at + 1)
        next_b = b + is_last.to(gl.int32)
        next_before = before - has_rows.to(gl.int32)
    else:
        q_start, q_len, end, lo, hi, first, step, count, next_at, next_before = run_parts.part_at(
            at, b, before, size, extra, stop, row, batch, seqlens_ptr, leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, left, right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
            PAGE_SIZE > 0, VIA,
        )  # fmt: skip
        leaf = 0
        is_first = at == before
        next_b = b + 1
    tiles = (cache_row, lo, hi, first, step, count)
    return q_start, q_len, end, tiles, leaf, is_first, next_at, next_b, next_before
