"""Keys and values that come with the call instead of lying in a cache: dense, or packed in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, Queries
from flash_decoding.validate import inputs, tensors, values

_NAMES = ("q", "k", "v")


def dense_keys(asked: Queries, k: Tensor, v: Tensor) -> KVCache:
    """Check (batch, kv_len, heads_kv, head_dim) keys that every sequence uses from first to last."""
    capacity = inputs.layout(asked.q, asked.batch, k, v, names=_NAMES)
    if k.shape[0] != asked.batch:
        raise InvalidInput("k", f"{k.shape[0]} sequences", f"{asked.batch}, the batch of q")
    inputs.heads(asked.q, k.shape[2])
    return KVCache(k, v, inputs.lengths(None, asked.batch, capacity, asked.q.device), dense=True)


def packed_keys(
    asked: Queries,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor | None = None,
) -> KVCache:
    """Check keys of ragged sequences: (total_k, heads_kv, head_dim), or pages with a block table."""
    batch = asked.batch
    tensors.index("cu_seqlens_k", cu_seqlens_k, "(batch + 1,)", 1, asked.q.device)
    if cu_seqlens_k.shape[0] != batch + 1:
        wanted = f"({batch + 1},), as cu_seqlens_q"
        raise InvalidInput("cu_seqlens_k", tensors.shape_of(cu_seqlens_k), wanted)
    if not isinstance(max_seqlen_k, (int, torch.SymInt)) or max_seqlen_k < 0:
        raise InvalidInput("max_seqlen_k", max_seqlen_k, "an int, 0 or more: the most keys of one sequence")
    if block_table is not None:
        return _paged_keys(
            asked, k, v, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, block_table=block_table
        )
    for name, x in (("k", k), ("v", v)):
        tensors.view(name, x, "(total_k, heads_kv, head_dim)", 3)
    if values.wanted(cu_seqlens_k):
        values.offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    # One row that all sequences share (batch stride 0): each begins behind those before it, its left padding.
    k, v = (x.unsqueeze(0).expand(batch, *x.shape) for x in (k, v))
    inputs.layout(asked.q, batch, k, v, names=_NAMES)
    inputs.heads(asked.q, k.shape[2])
    starts, ends = cu_seqlens_k[:-1], cu_seqlens_k[1:]
    return KVCache(k, v, ends, cache_leftpad=starts, max_kv_len=max_seqlen_k)


def _paged_keys(
    asked: Queries, k: Tensor, v: Tensor, *, cu_seqlens_k: Tensor, max_seqlen_k: int, block_table: Tensor
) -> KVCache:
    capacity = inputs.layout(asked.q, asked.batch, k, v, block_table=block_table, names=_NAMES)
    inputs.heads(asked.q, k.shape[2])
    if max_seqlen_k > capacity:
        raise InvalidInput("max_seqlen_k", max_seqlen_k, f"at most {capacity}, the slots of a sequence")
    cache = KVCache(k, v, cu_seqlens_k.diff(), block_table, max_kv_len=max_seqlen_k)
    if values.wanted(cu_seqlens_k):
        values.offsets("cu_seqlens_k", cu_seqlens_k, int(cu_seqlens_k[-1]), max_seqlen_k)
        values.cache(cache)
    return cache
