"""What a program does whose work is a run across sequences: one part after another.

Loaders and multipliers go along the parts each for themselves, by the same function; loaders are ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import keys, load, runs, softmax
from flash_decoding.kernels.roles import states
from flash_decoding.kernels.roles.loading import load_part
from flash_decoding.kernels.roles.multiplying import multiply_part, product_of, rows_of
from flash_decoding.kernels.rows import store_out


@gluon.jit
def part_at(
    at: gl.tensor,
    b: gl.tensor,
    before: gl.tensor,
    extra: gl.tensor,
    stop: gl.tensor,
    row: gl.tensor,
    batch: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
) -> gl.tuple:
    """The part of sequence b that begins at ``at``.

    Returns:
        Its queries' first token and number; end of the sequence's slots and [lo, hi) of those that are seen;
        its first tile and how many; where it ends, and where the sequence does.
    """
    origin, tiles = runs.tiles_of(
        b, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr, max_q_len, new_tokens, capacity,
        window_left, window_right, GROUP, BLOCK_N, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    behind = before + tiles + extra
    until = gl.minimum(behind, stop)
    q_start, q_len = keys.query_span(b, cu_seqlens_q_ptr, max_q_len)
    end, lo, hi = keys.seen_by(
        b, row, q_len, cache_seqlens_ptr, cache_leftpad_ptr, new_tokens, capacity, window_left, window_right,
        GROUP, BLOCK_M, BOUND_LEFT, BOUND_RIGHT,
    )  # fmt: skip
    first = gl.maximum(runs.tile_at(origin, at - before, extra), lo // BLOCK_N)
    last = gl.minimum(runs.tile_at(origin, until - before, extra), gl.cdiv(hi, BLOCK_N))
    return q_start, q_len, end, lo, hi, first, gl.maximum(last - first, 0), until, behind


@gluon.jit
def load_run(
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
    head_kv: gl.tensor,
    at: gl.tensor,
    b: gl.tensor,
    before: gl.tensor,
    extra: gl.tensor,
    stop: gl.tensor,
    row: gl.tensor,
    batch: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
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
    """Load the keys and values of all parts of a run."""
    turn = 0
    while at < stop:
        _, _, _, lo, hi, first, count, until, behind = part_at(
            at, b, before, extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, window_left, window_right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
        cache_row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
        load_part(
            k_ptr, v_ptr, k_strides, v_strides, head_kv, cache_row, block_table_ptr, table_stride, pool_pages,
            k_ring, v_ring, lo, hi, first, 1, count, turn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
            PAGE_SIZE, STAGES, LOADERS,
        )  # fmt: skip
        turn += count
        at = until
        before = behind
        b += 1


@gluon.jit
def multiply_run(
    q_ptr: gl.tensor,
    out_ptr: gl.tensor,
    lse_ptr: gl.tensor,
    q_strides: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    room: gl.tuple,
    alibi_ptr: gl.tensor,
    alibi_strides: gl.tuple,
    sinks_ptr: gl.tensor,
    scale: gl.tensor,
    softcap: gl.tensor,
    run: gl.tensor,
    head_kv: gl.tensor,
    at: gl.tensor,
    b: gl.tensor,
    before: gl.tensor,
    extra: gl.tensor,
    stop: gl.tensor,
    row: gl.tensor,
    batch: gl.tensor,
    cache_seqlens_ptr: gl.tensor,
    cache_leftpad_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    max_q_len: gl.tensor,
    new_tokens: gl.tensor,
    capacity: gl.tensor,
    window_left: gl.tensor,
    window_right: gl.tensor,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BOUND_LEFT: gl.constexpr,
    BOUND_RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    WHO: gl.constexpr,
) -> None:
    """Multiply what the loaders load, and write each part to scratch."""
    acc_in: gl.constexpr = product_of(BLOCK_M, BLOCK_DV)
    turn = 0
    part = 0
    while at < stop:
        q_start, q_len, end, lo, hi, first, count, until, behind = part_at(
            at, b, before, extra, stop, row, batch, cache_seqlens_ptr, cache_leftpad_ptr, cu_seqlens_q_ptr,
            max_q_len, new_tokens, capacity, window_left, window_right, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT,
        )  # fmt: skip
        peak, total, acc = multiply_part(
            q_ptr, q_strides, cu_seqlens_q_ptr, alibi_ptr, alibi_strides, sinks_ptr, scale, softcap,
            window_left, window_right, k_ring, v_ring, b, head_kv, row, q_start, q_len, end, lo, hi, first, 1,
            count, at == before, turn, TURNS, WHO, GROUP, HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT,
            BOUND_RIGHT, SOFTCAP, STAGES,
        )  # fmt: skip
        turn += count
        if WHO > 0:
            states.hand_over(room, part, peak, total, acc)
        else:
            if TURNS > 1:
                peak, total, acc = states.take_over(room, part, peak, total, acc)
            token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, acc_in))
            cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, acc_in))
            part_row = ((run + b).to(gl.int64) * max_q_len + token) * (HEADS_KV * GROUP) + head
            store_out(out_ptr, acc / softmax.denominator(total)[:, None], part_row, in_q, cols, HEAD_DIM_V)
            gl.store(lse_ptr + part_row, softmax.log_sum_exp(peak, total), mask=in_q)
        part += 1
        at = until
        before = behind
        b += 1
