"""Attention as FasterTransformer's decoder had it: one block of threads per sequence and query head.

A stand-in of our own for a kernel that is not maintained any more. Nothing is split, and the query heads of a
group each read the keys and values that they share.
"""

# ruff: noqa: N803, PLR0917 - compile-time constants of a kernel are uppercase, and it has no keywords

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_decoding.spec import KVCache, Options, Queries, padded

BLOCK_N = 512
NUM_WARPS = 16
"""As much in flight as the registers of a multiprocessor hold: the block has it to itself."""

LOG2_E = 1.4426950408889634


@triton.jit
def one_block_kernel(
    q_ptr: tl.tensor,  # (batch, 1, heads_q, head_dim)
    k_ptr: tl.tensor,  # (batch, capacity, heads_kv, head_dim)
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,  # (batch, 1, heads_q, head_dim), contiguous
    lengths_ptr: tl.tensor,  # (batch,) int32
    q_strides: tl.tuple,  # sequence, head
    k_strides: tl.tuple,  # sequence, slot, head
    v_strides: tl.tuple,
    new_tokens: tl.tensor,
    capacity: tl.tensor,
    group: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """``out = softmax(scale * q k^T) v`` over the live keys, for one query head of one sequence.

    Grid: (heads_q, batch). Slots from the length on are not used; without a live one, out is 0.
    """
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    shared = head // group
    columns, slots = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = columns < HEAD_DIM
    q = tl.load(q_ptr + sequence * q_strides[0] + head * q_strides[1] + columns, mask=inside, other=0.0)
    q = q.to(tl.float32) * scale_log2
    k_row = k_ptr + sequence * k_strides[0] + shared * k_strides[2] + columns
    v_row = v_ptr + sequence * v_strides[0] + shared * v_strides[2] + columns
    length = tl.minimum(tl.load(lengths_ptr + sequence) + new_tokens, capacity)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, length, BLOCK_N):
        slot = (start + slots).to(tl.int64)
        live = slot < length
        here = live[:, None] & inside[None, :]
        k = tl.load(k_row[None, :] + slot[:, None] * k_strides[1], mask=here, other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(k * q[None, :], 1), float("-inf"))
        v = tl.load(v_row[None, :] + slot[:, None] * v_strides[1], mask=here, other=0.0).to(tl.float32)
        higher = tl.maximum(peak, tl.max(scores, 0))
        weights = tl.exp2(scores - higher)
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * v, 0)
        peak = higher
    out = acc / tl.where(total > 0, total, 1.0)
    row = sequence * tl.num_programs(0) + head
    tl.store(out_ptr + row * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def attend(queries: Queries, cache: KVCache, options: Options) -> Tensor:
    """Plain attention of one token per sequence over a contiguous cache, (batch, 1, heads_q, head_dim)."""
    q, k, v = queries.q, cache.k, cache.v
    batch, _, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    one_block_kernel[(heads, batch)](
        q,
        k,
        v,
        out,
        cache.cache_seqlens,
        (q.stride(0), q.stride(2)),
        k.stride()[:3],
        v.stride()[:3],
        cache.new_tokens,
        cache.capacity,
        heads // cache.heads,
        options.softmax_scale * LOG2_E,
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )
    return out
