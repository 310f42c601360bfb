"""What programs do that go across sequences (:mod:`~flash_decoding.kernels.roles.walk`)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_decoding.kernels import keys, overlap
from flash_decoding.kernels.roles import early, walk
from flash_decoding.kernels.roles.loading import load_first, load_part
from flash_decoding.kernels.roles.multiplying import PRODUCT, as_operand, load_q, multiply_part, rows_of
from flash_decoding.kernels.rows import store_final, store_part, store_state


@gluon.jit
def load_run(
    cache: gl.tuple,
    lengths: gl.tuple,
    queries: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    where: gl.tuple,  # first row, key/value head, run; number of runs, of sequences, of parts of one
    early_tiles: gl.tensor,  # of the sequences, as far as could be told; and what follows from them
    found: gl.tuple,
    expected: gl.tuple,
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
    FIXED: gl.constexpr,
    EXPECTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
    LOADERS: gl.constexpr,
) -> None:
    """Load the keys and values of all parts of a run, the first tiles as expected."""
    row, head_kv, _, _, _, _ = where
    given = 0
    if EXPECTS:
        given = load_first(
            cache, head_kv, expected, k_ring, v_ring, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
            STAGES, IN_FLIGHT, LOADERS,
        )  # fmt: skip
    elif OVERLAP:
        overlap.wait_for_the_kernel_before()
    at, b, before, size, extra, stop = walk.begin_by(
        found, early_tiles, where, lengths, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED
    )
    turn = 0
    visits = 0
    while walk.goes_on(at, before, stop, FIXED):
        q_start, q_len, _end, seen, hands, parts, _is_whole, next_at, next_before = walk.visit(
            at, b, before, size, extra, stop, where, cache, lengths, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT, FIXED,
        )  # fmt: skip
        if visits > 0:  # the multipliers come to it later; for the first one it would be late
            early.ask_for_queries(queries, b, row, head_kv, q_start, q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        for part in range(at, at + parts):
            tiles, _leaf, _is_first = walk.part_at(part, before, seen, hands, PAGE_SIZE, FIXED)
            kept = 0
            if EXPECTS:
                kept = early.kept_of(given, tiles, expected)
                turn += given - kept
                given = 0
            load_part(
                cache, head_kv, tiles, k_ring, v_ring, turn, kept, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK_N, PAGE_SIZE, STAGES, IN_FLIGHT, LOADERS,
            )  # fmt: skip
            turn += tiles[5]
        visits += 1
        at = next_at
        b += 1
        before = next_before


@gluon.jit
def multiply_run(
    cache: gl.tuple,
    lengths: gl.tuple,
    queries: gl.tuple,
    scoring: gl.tuple,
    results: gl.tuple,
    k_ring: gl.tuple,
    v_ring: gl.tuple,
    where: gl.tuple,
    early_tiles: gl.tensor,
    found: gl.tuple,
    expected: gl.tuple,
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
    FIXED: gl.constexpr,
    LEAVES: gl.constexpr,
    EXPECTS: gl.constexpr,
    STAGES: gl.constexpr,
    IN_FLIGHT: gl.constexpr,
) -> None:
    """Multiply what the loaders load, and write each part to scratch."""
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    row, head_kv, run, _, _, num_parts = where
    out_ptr, lse_ptr, final = results
    given = 0
    if EXPECTS:
        given = gl.minimum(expected[5], IN_FLIGHT)
    at, b, before, size, extra, stop = walk.begin_by(
        found, early_tiles, where, lengths, GROUP, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, FIXED
    )
    turn = 0
    while walk.goes_on(at, before, stop, FIXED):
        q_start, q_len = keys.query_span(b, lengths[2], lengths[3])
        # before anything that waits for a length
        q = load_q(queries, b, row, head_kv, q_start, q_len, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M)
        _, _, end, seen, hands, parts, is_whole, next_at, next_before = walk.visit(
            at, b, before, size, extra, stop, where, cache, lengths, GROUP, BLOCK_M, BLOCK_N, PAGE_SIZE,
            BOUND_LEFT, BOUND_RIGHT, FIXED,
        )  # fmt: skip
        q = as_operand(q)
        for part in range(at, at + parts):
            tiles, leaf, is_first = walk.part_at(part, before, seen, hands, PAGE_SIZE, FIXED)
            if EXPECTS:
                lost = given - early.kept_of(given, tiles, expected)
                early.let_go(k_ring, v_ring, lost, STAGES)
                turn += lost
                given = 0
            peak, total, acc = multiply_part(
                q, scoring, k_ring, v_ring, b, head_kv, row, q_len, end, tiles, leaf, is_first, turn, GROUP,
                BLOCK_DV, BLOCK_M, BLOCK_N, BOUND_LEFT, BOUND_RIGHT, SCORES, LEAVES, STAGES, True,
            )  # fmt: skip
            turn += tiles[5]
            token, head, in_q = rows_of(row, head_kv, q_len, GROUP, BLOCK_M, gl.SliceLayout(1, PRODUCT))
            cols = gl.arange(0, BLOCK_DV, gl.SliceLayout(0, PRODUCT))
            if FIXED[0] > 0:  # and no registers for two ways to write
                store_state(
                    out_ptr, lse_ptr, peak, total, acc, q_start, token, head, in_q, cols, part, num_parts,
                    HEADS_KV * GROUP, HEAD_DIM_V,
                )  # fmt: skip
            elif is_whole:
                store_final(
                    final[0], final[1], final[2], peak, total, acc, b, q_start, token, head, in_q, cols,
                    lengths[2], HEADS_KV * GROUP, HEAD_DIM_V,
                )  # fmt: skip
            else:
                store_part(
                    out_ptr, lse_ptr, peak, total, acc, run + b, lengths[3], token, head, in_q, cols,
                    HEADS_KV * GROUP, HEAD_DIM_V,
                )  # fmt: skip
        at = next_at
        b += 1
        before = next_before
    if EXPECTS:
        early.let_go(k_ring, v_ring, given, STAGES)
