"""What a program does: one unit after another, as many as there are for each multiprocessor.

A unit is a row tile of one key/value head, and one split of one sequence. Loaders and multipliers go along
the units of their program each for themselves, by the same function; loaders are ahead, so the memory does
not notice when a unit ends.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import keys, load, overlap
from flash_decoding.kernels.attend import split_and_sequence
from flash_decoding.kernels.load import VIA_L1
from flash_decoding.kernels.roles import early
from flash_decoding.kernels.roles.loading import load_first, load_part
from flash_decoding.kernels.roles.multiplying import PRODUCT, as_operand, load_q, multiply_part, rows_of
from flash_decoding.kernels.rows import store_split, store_state


@gluon.jit
def place_of(
    unit: gl.tensor,
    max_q_len: gl.tensor,
    num_splits: gl.tensor,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    IS_SPLIT: gl.constexpr,
) -> gl.tuple:
    """First row, key/value head, split and sequence of a unit, fastest first."""
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    place = unit // row_tiles
    split, b = split_and_sequence(place // HEADS_KV, num_splits, IS_SPLIT)
    return (unit - place * row_tiles) * BLOCK_M, place % HEADS_KV, split, b


@gluon.jit
def slots_of(b: gl.tensor, cache: gl.tuple, lengths: gl.tuple, VIA: gl.constexpr = VIA_L1) -> gl.tuple:
    """[first, end) of a sequence's slots, and its row of the cache: all that has to be read for a unit."""
    first, end = keys.live_slots(b, lengths[0], lengths[1], lengths[4], lengths[5], VIA)
    return first, end, load.cache_row(b, cache[4], cache[5], VIA)


@gluon.jit
def part_of(
    row: gl.tensor,
    split: gl.tensor,
    q_len: gl.tensor,
    slots: gl.tuple,
    lengths: gl.tuple,
    num_splits: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    FIXED: gl.constexpr,
) -> gl.tuple:
    """What there is to do in a unit of so many query tokens.

    Returns:
        Whether there is anything; the tiles, none if there is nothing; and those of a leaf.
    """
    first, end, cache_row = slots
    lo, hi = keys.visible_slots(
        row, q_len, first, end, lengths[6], lengths[7], GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT
    )
    first_tile, step, count, leaf, live_splits = keys.part_of(
        split, lo, hi, num_splits, BLOCK_N, PAGE_SIZE > 0, IS_SPLIT, FIXED
    )
    lives = (row < q_len * GROUP) & (split < live_splits)
    return lives, (cache_row, lo, hi, first_tile, step, gl.where(lives, count, 0)), leaf


@gluon.jit
def part_by(
    is_first: gl.tensor,
    foreseen: gl.tuple,  # slots, and the part that follows from them
    row: gl.tensor,
    split: gl.tensor,
    q_len: gl.tensor,
    slots: gl.tuple,
    lengths: gl.tuple,
    num_splits: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    FIXED: gl.constexpr,
    EXPECTS: gl.constexpr,
) -> gl.tuple:
    """As :func:`part_of`, without reckoning again where a program's first unit is as it was foreseen."""
    if EXPECTS:
        before, known = foreseen
        same = is_first & (slots[0] == before[0]) & (slots[1] == before[1]) & (slots[2] == before[2])
        lives, tiles, leaf = known
        if not same:
            lives, tiles, leaf = part_of(
                row, split, q_len, slots, lengths, num_splits, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT,
                BOUND_RIGHT, IS_SPLIT, FIXED,
            )  # fmt: skip
    else:
        lives, tiles, leaf = part_of(
            row, split, q_len, slots, lengths, num_splits, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT,
            BOUND_RIGHT, IS_SPLIT, FIXED,
        )  # fmt: skip
    return lives, tiles, leaf


@gluon.jit
def load_units(
    cache: gl.tuple,
    lengths: gl.tuple,
    queries: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    units: gl.tensor,
    num_splits: gl.tensor,
    foreseen: gl.tuple,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    OVERLAP: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    FIXED: gl.constexpr,
    EXPECTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Load the keys and values of all units of this program, the first tiles as expected."""
    given = 0
    if EXPECTS:
        _, head_kv, _, _ = place_of(
            gl.program_id(0), lengths[3], num_splits, HEADS_KV, GROUP, BLOCK_M, IS_SPLIT
        )
        given = load_first(
            cache, head_kv, foreseen[1][1], k_ring, v_ring, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
            STAGES, IN_FLIGHT, LOADERS,
        )  # fmt: skip
    elif OVERLAP:
        overlap.wait_for_the_kernel_before()
    turn = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, head_kv, split, b = place_of(unit, lengths[3], num_splits, HEADS_KV, GROUP, BLOCK_M, IS_SPLIT)
        q_start, q_len = keys.query_span(b, lengths[2], lengths[3])
        is_first = unit == gl.program_id(0)
        _, tiles, _ = part_by(
            is_first, foreseen, row, split, q_len, slots_of(b, cache, lengths), lengths, num_splits, GROUP,
            BLOCK_M, BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, IS_SPLIT, FIXED, EXPECTS,
        )  # fmt: skip
        kept = 0
        if EXPECTS:
            kept = early.kept_of(given, tiles, foreseen[1][1])
            turn += given - kept
            given = 0
        if not is_first:  # the multipliers come to it later; for the first one it would be late
            early.ask_for_queries(queries, b, row, head_kv, q_start, q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        load_part(
            cache, head_kv, tiles, k_ring, v_ring, turn, kept, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, PAGE_SIZE, STAGES, IN_FLIGHT, LOADERS,
        )  # fmt: skip
        turn += tiles[5]


@gluon.jit
def multiply_units(
    cache: gl.tuple,
    lengths: gl.tuple,
    queries: gl.tuple,
    scoring: gl.tuple,
    results: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    units: gl.tensor,
    num_splits: gl.tensor,
    foreseen: gl.tuple,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SCORES: gl.constexpr,
    OVERLAP: gl.constexpr,
    IS_SPLIT: gl.constexpr,
    FIXED: gl.constexpr,
    STATES: gl.constexpr,
    LEAVES: gl.constexpr,
    EXPECTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
) -> None:
    """Multiply what the loaders load, and write the result of each unit."""
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    out_ptr, lse_ptr, lse_strides = results
    given = 0
    if EXPECTS:
        given = gl.minimum(foreseen[1][1][5], IN_FLIGHT)
    turn = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, head_kv, split, b = place_of(unit, lengths[3], num_splits, HEADS_KV, GROUP, BLOCK_M, IS_SPLIT)
        q_start, q_len = keys.query_span(b, lengths[2], lengths[3])
        # before anything that waits for a length
        q = load_q(queries, b, row, head_kv, q_start, q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        slots = slots_of(b, cache, lengths)
        lives, tiles, leaf = part_by(
            unit == gl.program_id(0), foreseen, row, split, q_len, slots, lengths, num_splits, GROUP, BLOCK_M,
            BLOCK_N, PAGE_SIZE, BOUND_LEFT, BOUND_RIGHT, IS_SPLIT, FIXED, EXPECTS,
        )  # fmt: skip
        if EXPECTS:
            lost = given - early.kept_of(given, tiles, foreseen[1][1])
            early.let_go(k_ring, v_ring, lost, STAGES)
            turn += lost
            given = 0
        peak, total, acc = multiply_part(
            as_operand(q), scoring, k_ring, v_ring, b, head_kv, row, q_len, slots[1], tiles, leaf, split == 0,
            turn, GROUP, BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SCORES, LEAVES, STAGES, False,
        )  # fmt: skip
        turn += tiles[5]
        token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, PRODUCT))
        cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, PRODUCT))
        if STATES:
            store_state(
                out_ptr, lse_ptr, peak, total, acc, q_start, token, head, in_q & lives, cols, split,
                num_splits, HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
        else:
            store_split(
                out_ptr, lse_ptr, lse_strides, peak, total, acc, b, q_start, token, head, in_q & lives, cols,
                lengths[2], split, num_splits, HEADS_KV * GROUP, HEAD_DIM_V,
            )  # fmt: skip
