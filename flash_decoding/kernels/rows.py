"""Query rows in, output rows out.

Row ``r`` of a key/value head is query token ``r // group``, query head ``r % group`` of its group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flash_decoding.kernels import softmax


@triton.jit
def load_queries(
    q_ptr: tl.tensor,
    strides: tl.tuple,  # sequence, token, head; the sequence's is 0 where queries are ragged
    b: tl.tensor,
    q_start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    in_q: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    cols: tl.tensor,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """(rows, cols) of q; rows and columns that do not exist read as 0."""
    base = q_ptr + tl.cast(b, tl.int64) * strides[0]
    if cu_seqlens_q_ptr is not None:
        base += q_start * strides[1]
    rows = token.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    mask = in_q[:, None] & (cols < HEAD_DIM)[None, :]
    return tl.load(base + rows[:, None] + cols[None, :], mask=mask, other=0.0)


@triton.jit
def store_out(
    out_ptr: tl.tensor,
    out: tl.tensor,
    flat_row: tl.tensor,
    in_q: tl.tensor,
    cols: tl.tensor,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Write (rows, cols) to a contiguous (flat rows, HEAD_DIM_V), in its dtype."""
    ptrs = out_ptr + (flat_row * HEAD_DIM_V)[:, None] + cols[None, :]
    tl.store(ptrs, out.to(out_ptr.dtype.element_ty), mask=in_q[:, None] & (cols < HEAD_DIM_V)[None, :])


@triton.jit
def row_among(
    first_token: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    number: tl.tensor,
    part: tl.tensor,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """Rows of a contiguous (tokens, HEADS, number) for one of each row's parts.

    Of many rows what they have in common is reckoned by itself, in 64 bits; the rest has no need of them.
    """
    if token.shape[0] >= softmax.MANY_ROWS:
        common = first_token * HEADS * number + part
        flat_row = common + (token * HEADS + head).to(tl.int64) * number
    else:
        flat_row = ((first_token + token) * HEADS + head) * number + part
    return flat_row


@triton.jit
def store_state(
    acc_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    q_start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    in_q: tl.tensor,
    cols: tl.tensor,
    part: tl.tensor,
    num_parts: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Write states of a part: acc to (tokens, HEADS, num_parts, HEAD_DIM_V), peak and total beside it to
    (tokens, HEADS, num_parts, 2).
    """
    flat_row = row_among(q_start, token, head, num_parts, part, HEADS)
    store_out(acc_ptr, acc, flat_row, in_q, cols, HEAD_DIM_V)
    tl.store(sums_ptr + flat_row * 2, peak, mask=in_q)
    tl.store(sums_ptr + flat_row * 2 + 1, total, mask=in_q)


@triton.jit
def store_part(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    number: tl.tensor,
    max_q_len: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    in_q: tl.tensor,
    cols: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Write the result of a run's part to out (parts, max_q_len, HEADS, HEAD_DIM_V), and its LSE."""
    part_row = row_among(tl.cast(number, tl.int64) * max_q_len, token, head, 1, 0, HEADS)
    store_out(out_ptr, softmax.output(acc, total[:, None], acc.shape[0]), part_row, in_q, cols, HEAD_DIM_V)
    tl.store(lse_ptr + part_row, softmax.log_sum_exp(peak, total), mask=in_q)


@triton.jit
def lse_offset(
    strides: tl.tuple,  # sequence, head, token, and perhaps more
    b: tl.tensor,
    q_start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
) -> tl.tensor:
    """Where the log-sum-exp of a row lies: (sequence, head, token), or (head, token of all) where ragged."""
    wide_token = token.to(tl.int64)
    if cu_seqlens_q_ptr is not None:
        wide_token += q_start
    return tl.cast(b, tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + wide_token * strides[2]


@triton.jit
def store_split(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    lse_strides: tl.tuple,  # sequence, head, token, split
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    b: tl.tensor,
    q_start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    in_q: tl.tensor,
    cols: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    split: tl.tensor,
    num_splits: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Write the result of a split to out (tokens, HEADS, num_splits, HEAD_DIM_V), and its LSE if any."""
    flat_row = row_among(q_start, token, head, num_splits, split, HEADS)
    store_out(out_ptr, softmax.output(acc, total[:, None], acc.shape[0]), flat_row, in_q, cols, HEAD_DIM_V)
    if lse_ptr is not None:
        offset = lse_offset(lse_strides, b, q_start, token, head, cu_seqlens_q_ptr) + split * lse_strides[3]
        tl.store(lse_ptr + offset, softmax.log_sum_exp(peak, total), mask=in_q)


@triton.jit
def store_final(
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    lse_strides: tl.tuple,  # sequence, head, token
    peak: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    b: tl.tensor,
    q_start: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    in_q: tl.tensor,
    cols: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
) -> None:
    """Write the result of a whole sequence, as that of its only split."""
    strides = (lse_strides[0], lse_strides[1], lse_strides[2], 0)
    store_split(
        out_ptr, lse_ptr, strides, peak, total, acc, b, q_start, token, head, in_q, cols, cu_seqlens_q_ptr, 0,
        1, HEADS, HEAD_DIM_V,
    )  # fmt: skip
