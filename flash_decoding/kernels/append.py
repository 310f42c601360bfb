"""New keys and values into a cache, in place, with rotary embedding of keys and queries on the way.

Grid (one dimension): groups of BLOCK_H heads (key/value heads first, then query heads), tokens, sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from flash_decoding.kernels import load, overlap, repeat
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, NewTokens

MAX_BLOCK_H = 8
"""Heads per program: 8 heads of 128 elements are what 4 warps load in one go."""

# What changes from call to call must not choose the compiled kernel (contract C6).
SIZES = ["new_len", "q_len", "capacity", "pages", "cache_rows", "table_stride", "positions"]
TABLES = ["cache_seqlens_ptr", "cache_batch_idx_ptr", "block_table_ptr"]


@triton.jit
def head_ptrs(
    ptr: tl.tensor, strides: tl.tuple, outer: tl.tensor, inner: tl.tensor, heads: tl.tensor
) -> tl.tensor:
    """(heads, 1) pointers to the vectors of some heads of one token; all indices are int64."""
    return ptr + outer * strides[0] + inner * strides[1] + (heads * strides[2])[:, None]


@triton.jit
def mask_of(heads: tl.tensor, HEADS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr) -> tl.tensor:
    """(heads, columns) that exist."""
    return (heads < HEADS)[:, None] & (tl.arange(0, BLOCK_COLS) < COLS)[None, :]


@triton.jit
def store(ptrs: tl.tensor, x: tl.tensor, mask: tl.tensor, BLOCK_COLS: tl.constexpr) -> None:
    """Write the vectors of some heads, in the dtype of where they go."""
    tl.store(ptrs + tl.arange(0, BLOCK_COLS)[None, :], x.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def rotated(
    x_ptrs: tl.tensor,
    mask: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position: tl.tensor,
    rotary_strides: tl.tuple,  # position of cos, position of sin
    BLOCK_COLS: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tl.tensor:
    """(heads, columns) of x with its first ROTARY_DIM columns rotated, in fp32.

    Column c and its partner p turn by angle f: x_c cos f -+ x_p sin f. The layouts differ in who is the
    partner and which frequency a column has, and in nothing else.
    """
    cols = tl.arange(0, BLOCK_COLS)
    x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        if INTERLEAVED:
            frequency, first = cols // 2, cols % 2 == 0
            partner = tl.where(first, cols + 1, cols - 1)
        else:
            frequency, first = cols % half, cols < half
            partner = tl.where(first, cols + half, cols - half)
        turns = cols < ROTARY_DIM
        cos = tl.load(cos_ptr + position * rotary_strides[0] + frequency, mask=turns, other=1.0).to(
            tl.float32
        )
        sin = tl.load(sin_ptr + position * rotary_strides[1] + frequency, mask=turns, other=0.0).to(
            tl.float32
        )
        other = tl.load(x_ptrs + partner[None, :], mask=mask & turns[None, :], other=0.0).to(tl.float32)
        x = x * cos[None, :] + tl.where(first, -other, other) * sin[None, :]
    return x


@triton.jit(do_not_specialize=[*SIZES, *TABLES])
def append_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    q_rotated_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    k_strides: tl.tuple,  # sequence, token, head
    v_strides: tl.tuple,
    q_strides: tl.tuple,
    k_cache_strides: tl.tuple,  # page, slot, head
    v_cache_strides: tl.tuple,
    q_rotated_strides: tl.tuple,
    rotary_strides: tl.tuple,
    cache_seqlens_ptr: tl.tensor,
    cache_batch_idx_ptr: tl.tensor,
    block_table_ptr: tl.tensor,
    new_len: tl.tensor,
    q_len: tl.tensor,
    capacity: tl.tensor,
    pages: tl.tensor,
    cache_rows: tl.tensor,
    table_stride: tl.tensor,
    positions: tl.tensor,
    HEADS_KV: tl.constexpr,
    HEADS_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ADVANCE_Q: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    if OVERLAP:
        overlap.wait_for_the_kernel_before()
        overlap.let_the_next_kernel_start()
    kv_blocks: tl.constexpr = (HEADS_KV + BLOCK_H - 1) // BLOCK_H
    blocks: tl.constexpr = kv_blocks + (HEADS_Q + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    tokens = tl.maximum(new_len, q_len)
    block = pid % blocks
    token = tl.cast(pid // blocks % tokens, tl.int64)
    b = tl.cast(pid // (blocks * tokens), tl.int64)
    length = tl.maximum(tl.load(cache_seqlens_ptr + b), 0)
    slot = length + token
    lanes = tl.arange(0, BLOCK_H).to(tl.int64)
    if (block < kv_blocks) & (token < new_len) & (slot < capacity):
        heads = block * BLOCK_H + lanes
        row = load.cache_row(b, cache_batch_idx_ptr, cache_rows)
        page, first, more = load.place(
            row, slot, 0, slot + 1, block_table_ptr, table_stride, pages, PAGE_SIZE, 1
        )
        place = first + more
        k_from = head_ptrs(k_ptr, k_strides, b, token, heads)
        mask = mask_of(heads, HEADS_KV, HEAD_DIM, BLOCK_D)
        position = tl.minimum(slot, positions - 1)
        k = rotated(
            k_from, mask, cos_ptr, sin_ptr, position, rotary_strides, BLOCK_D, ROTARY_DIM, INTERLEAVED
        )
        store(head_ptrs(k_cache_ptr, k_cache_strides, page, place, heads), k, mask, BLOCK_D)
        mask_v = mask_of(heads, HEADS_KV, HEAD_DIM_V, BLOCK_DV)
        v_from = head_ptrs(v_ptr, v_strides, b, token, heads) + tl.arange(0, BLOCK_DV)[None, :]
        v_to = head_ptrs(v_cache_ptr, v_cache_strides, page, place, heads)
        store(v_to, tl.load(v_from, mask=mask_v), mask_v, BLOCK_DV)
    if HEADS_Q > 0 and (block >= kv_blocks) & (token < q_len):
        heads = (block - kv_blocks) * BLOCK_H + lanes
        q_from = head_ptrs(q_ptr, q_strides, b, token, heads)
        mask = mask_of(heads, HEADS_Q, HEAD_DIM, BLOCK_D)
        position = tl.minimum(slot if ADVANCE_Q else length.to(tl.int64), positions - 1)
        q = rotated(
            q_from, mask, cos_ptr, sin_ptr, position, rotary_strides, BLOCK_D, ROTARY_DIM, INTERLEAVED
        )
        store(head_ptrs(q_rotated_ptr, q_rotated_strides, b, token, heads), q, mask, BLOCK_D)


def launch(new: NewTokens, cache: KVCache, *, overlaps: bool) -> repeat.Repeat | None:
    """Write ``new.k`` and ``new.v`` at ``cache_seqlens``, and ``new.q_rotated`` where rotary is given.

    Tokens beyond the capacity are dropped: the caller has checked what can be checked without a sync.

    Args:
        new: keys, values, and perhaps queries to rotate.
        cache: where they go.
        overlaps: start while the kernel before ends; the hardware must know how.

    Returns:
        The launch, to be repeated; None from Triton's interpreter.
    """
    k, v, rotary, table = new.k, new.v, new.rotary, cache.block_table
    batch, new_len, heads_kv, _ = k.shape
    q = new.q if rotary is not None else None
    q_len, heads_q = (0, 0) if q is None else (q.shape[1], q.shape[2])
    block_h = min(MAX_BLOCK_H, triton.next_power_of_2(heads_kv))
    blocks = triton.cdiv(heads_kv, block_h) + triton.cdiv(heads_q, block_h)
    args = (
        k,
        v,
        q,
        cache.k,
        cache.v,
        new.q_rotated,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
        k.stride()[:3],
        v.stride()[:3],
        _strides(q),
        cache.k.stride()[:3],
        cache.v.stride()[:3],
        _strides(new.q_rotated),
        (0, 0) if rotary is None else (rotary.cos.stride(0), rotary.sin.stride(0)),
        cache.cache_seqlens,
        cache.cache_batch_idx,
        table,
        new_len,
        q_len,
        cache.capacity,
        cache.k.shape[0],
        cache.k.shape[0] if table is None else table.shape[0],
        0 if table is None else table.stride(0),
        0 if rotary is None else rotary.cos.shape[0],
    )
    constants = _constants(new, cache, heads_q, block_h)
    constants |= {"OVERLAP": overlaps, **overlap.launch_options(overlaps)}
    return repeat.launch(append_kernel, blocks * max(new_len, q_len) * batch, args, constants)


def _constants(new: NewTokens, cache: KVCache, heads_q: int, block_h: int) -> dict[str, object]:
    """What a compiled append kernel is made for (contract C6)."""
    rotary, head_dim, head_dim_v = new.rotary, new.k.shape[3], new.v.shape[3]
    return {
        "HEADS_KV": cache.heads,
        "HEADS_Q": heads_q,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "BLOCK_H": block_h,
        "PAGE_SIZE": cache.page_size,
        "ROTARY_DIM": 0 if rotary is None else rotary.rotary_dim,
        "INTERLEAVED": rotary is not None and rotary.interleaved,
        "ADVANCE_Q": rotary is not None and rotary.advance_q,
    }


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]
