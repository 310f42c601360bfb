"""What a program does: one unit after another, as many as there are for each multiprocessor.

A unit is a row tile of one key/value head, and one split of one sequence. Loaders and multipliers go along
the units of their program each for themselves, by the same function; loaders are ahead, so the memory does
not notice when a unit ends.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import keys, load, softmax
from flash_decoding.kernels.roles import states
from flash_decoding.kernels.roles.loading import load_part
from flash_decoding.kernels.roles.multiplying import multiply_part, product_of, rows_of
from flash_decoding.kernels.rows import lse_offset, store_out


@gluon.jit
def place_of(
    unit: gl.tensor,
    max_q_len: gl.tensor,
    num_splits: gl.tensor,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
) -> gl.tuple:
    """First row, key/value head, split and sequence of a unit, fastest first."""
    row_tiles = gl.cdiv(max_q_len * GROUP, BLOCK_M)
    head_kv = unit // row_tiles
    split = head_kv // HEADS_KV
    return unit % row_tiles * BLOCK_M, head_kv % HEADS_KV, split % num_splits, split // num_splits


@gluon.jit
def part_of(
    b: gl.tensor,
    row: gl.tensor,
    split: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    num_splits: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
) -> gl.tuple:
    """What there is to do in a unit.

    Returns:
        Whether there is anything; first query token and how many; end of the slots, and [lo, hi) of those
        seen; first tile, the step from each to the next, and how many, 0 where there is nothing to do.
    """
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    first, step, count, _, live_splits = keys.part_of(
        split, lo, hi, num_splits, None, None, None, BLOCK_N, PAGE_SIZE > 0
    )
    lives = (row < q_len * GROUP) & (split < live_splits)
    return lives, q_start, q_len, end, lo, hi, first, step, gl.where(lives, count, 0)


@gluon.jit
def load_units(
    k_ptr: gl.tensor,
    v_ptr: gl.tensor,
    k_strides: gl.tuple,
    v_strides: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    cache_batch_idx_ptr: gl.tensor,
    cache_rows: gl.tensor,
    block_table_ptr: gl.tensor,
    table_stride: gl.tensor,
    pool_pages: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    units: gl.tensor,
    num_splits: gl.tensor,
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
    STAGES: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Load the keys and values of all units of this program."""
    turn = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, head_kv, split, b = place_of(unit, max_q_len, num_splits, HEADS_KV, GROUP, BLOCK_M)
        _, _, _, _, lo, hi, first, step, count = part_of(
            b, row, split, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, window_left, window_right,
            max_q_len, new_tokens, capacity, num_splits, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
        load_part(
            k_ptr, v_ptr, k_strides, v_strides, head_kv, cache_row, block_table_ptr, table_stride, pool_pages,
            k_ring, v_ring, lo, hi, first, step, count, turn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
            BLOCK_N, PAGE_SIZE, STAGES, LOADERS,
        )  # fmt: skip
        turn += count


@gluon.jit
def multiply_units(
    q_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q_strides: gl.tuple,
    lse_strides: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    room: gl.tuple,
    alibi_ptr: gl.tensor,
    alibi_strides: gl.tuple,
    sinks_ptr: gl.tensor,
    scale: gl.tensor,
    softcap: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    units: gl.tensor,
    num_splits: gl.tensor,
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
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    WHO: gl.constexpr,
) -> None:
    """Multiply what the loaders load, and write the result of each unit."""
    acc_in: gl.constexpr = product_of(BLOCK_M, BLOCK_DV)
    turn = 0
    part = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        row, head_kv, split, b = place_of(unit, max_q_len, num_splits, HEADS_KV, GROUP, BLOCK_M)
        lives, q_start, q_len, end, lo, hi, first, step, count = part_of(
            b, row, split, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, window_left, window_right,
            max_q_len, new_tokens, capacity, num_splits, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT,
        )  # fmt: skip
        peak, total, acc = multiply_part(
            q_ptr, q_strides, cu_seqlens_q_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
            window_left, window_right, k_ring, v_ring, b, head_kv, row, q_start, q_len, end, lo, hi, first,
            step, count, split == 0, turn, TURNS, WHO, GROUP, HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT, SOFTCAP, STAGES,
        )  # fmt: skip
        turn += count
        if WHO > 0:
            states.hand_over(room, part, peak, total, acc)
        else:
            if TURNS > 1:
                peak, total, acc = states.take_over(room, part, peak, total, acc)
            token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, acc_in))
            in_q &= lives
            cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, acc_in))
            flat_row = ((q_start + token) * (HEADS_KV * GROUP) + head) * num_splits + split
            store_out(out_ptr, acc / softmax.denominator(total)[:, None], flat_row, in_q, cols, HEAD_DIM_V)
            if lse_ptr is not None:
                offset = lse_offset(lse_strides, b, q_start, token, head, cu_seqlens_q_ptr)
                offset += split * lse_strides[3]
                gl.store(lse_ptr + offset, softmax.log_sum_exp(peak, total), mask=in_q)
        part += 1
