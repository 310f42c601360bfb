"""Queries, cache and options of a call to attention."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import UNBOUNDED, KVCache, Options, Queries
from flash_decoding.validate import tensors, values

MAX_SPLITS = 128
"""As in flash-attn; more than enough to fill a GPU from one key/value head."""

_INTEGERS = (int, torch.SymInt)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def queries(q: Tensor) -> Queries:
    """Check a dense batch of queries, (batch, q_len, heads_q, head_dim)."""
    tensors.leading("q", q, "(batch, q_len, heads_q, head_dim)", 4)
    return Queries(q)


def ragged_queries(q: Tensor, cu_seqlens_q: Tensor, max_q_len: int, max_name: str = "max_q_len") -> Queries:
    """Check packed queries, (total_q, heads_q, head_dim)."""
    tensors.leading("q", q, "(total_q, heads_q, head_dim)", 3)
    tensors.index("cu_seqlens_q", cu_seqlens_q, "(batch + 1,)", 1, q.device)
    if cu_seqlens_q.shape[0] < 2:
        raise InvalidInput("cu_seqlens_q", tensors.shape_of(cu_seqlens_q), "(batch + 1,) with batch >= 1")
    if not isinstance(max_q_len, _INTEGERS) or max_q_len < 1:
        raise InvalidInput(max_name, max_q_len, "an int >= 1, the longest q_len of the batch")
    if values.wanted(cu_seqlens_q):
        values.offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_q_len)
    return Queries(q, cu_seqlens_q, max_q_len)


def layout(
    like: Tensor,
    batch: int,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    names: tuple[str, str, str] = ("q", "k_cache", "v_cache"),
) -> int:
    """Check where keys and values lie against a checked tensor with their head_dim; return the capacity.

    Args:
        like: the queries, or the keys on their way in.
        names: what the caller calls ``like`` and the two parts of the cache.
    """
    like_name, k_name, v_name = names
    tensors.like(k_name, k_cache, like_name, like)
    tensors.like(v_name, v_cache, like_name, like)
    k_shape, v_shape = k_cache.shape, v_cache.shape
    if k_shape[3] != like.shape[-1]:
        raise InvalidInput(
            k_name, f"head_dim {k_shape[3]}", f"head_dim {like.shape[-1]}, that of {like_name}"
        )
    if v_shape[:3] != k_shape[:3]:
        wanted = f"{tuple(k_shape[:3])} as leading dimensions, those of {k_name}"
        raise InvalidInput(v_name, tensors.shape_of(v_cache), wanted)
    tensors.head_dim(v_name, v_shape[3])
    if cache_batch_idx is not None:
        tensors.per_sequence("cache_batch_idx", cache_batch_idx, batch, like.device)
    if block_table is None:
        if cache_batch_idx is None and k_shape[0] < batch:
            raise InvalidInput(k_name, f"{k_shape[0]} rows", f"{batch} or more, one per sequence")
        return k_shape[1]
    tensors.index("block_table", block_table, "(batch, max_pages)", 2, like.device)
    if cache_batch_idx is None and block_table.shape[0] != batch:
        raise InvalidInput("block_table", f"{block_table.shape[0]} rows", f"{batch}, one per sequence")
    return block_table.shape[1] * k_shape[1]


def heads(q: Tensor, heads_kv: int) -> None:
    """Check that query heads can share the key/value heads evenly."""
    heads_q = q.shape[-2]
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise InvalidInput("q", f"{heads_q} heads", f"a multiple of the {heads_kv} key/value heads")


def sizes(*, heads_q: int, heads_kv: int, head_dim: int, head_dim_v: int | None) -> None:
    """Check the sizes of a call that is yet to come."""
    if heads_kv < 1:
        raise InvalidInput("heads_kv", heads_kv, "1 or more")
    if heads_q < 1 or heads_q % heads_kv != 0:
        raise InvalidInput("heads_q", heads_q, f"a multiple of heads_kv = {heads_kv}")
    tensors.head_dim("head_dim", head_dim)
    if head_dim_v is not None:
        tensors.head_dim("head_dim_v", head_dim_v)


def lengths(
    cache_seqlens: Tensor | int | None, batch: int, capacity: int, device: torch.device, new_len: int = 0
) -> Tensor:
    """cache_seqlens as the (batch,) int32 tensor that kernels read; None fills the capacity."""
    if isinstance(cache_seqlens, Tensor):
        tensors.per_sequence("cache_seqlens", cache_seqlens, batch, device)
        return cache_seqlens
    length = capacity if cache_seqlens is None else cache_seqlens
    if isinstance(length, bool) or not isinstance(length, _INTEGERS):
        raise InvalidInput("cache_seqlens", type(length).__name__, "an int or a (batch,) int32 tensor")
    if length < 0 or length + new_len > capacity:
        room = f"an int from 0 to {capacity - new_len}"
        raise InvalidInput("cache_seqlens", length, f"{room} ({capacity} slots, {new_len} for new tokens)")
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def kv_cache(
    asked: Queries,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    new_len: int = 0,
) -> KVCache:
    """Check a cache, contiguous or paged, against the queries that attend to it.

    Args:
        new_len: tokens that the same step appends behind ``cache_seqlens`` before it attends.
    """
    q, batch = asked.q, asked.batch
    capacity = layout(q, batch, k_cache, v_cache, block_table=block_table, cache_batch_idx=cache_batch_idx)
    heads(q, k_cache.shape[2])
    if cache_leftpad is not None:
        tensors.per_sequence("cache_leftpad", cache_leftpad, batch, q.device)
    seqlens = lengths(cache_seqlens, batch, capacity, q.device, new_len)
    cache = KVCache(
        k_cache,
        v_cache,
        seqlens,
        block_table,
        cache_batch_idx,
        cache_leftpad,
        new_tokens=new_len,
        dense=cache_seqlens is None,
    )
    if values.wanted(q):
        values.cache(cache)
    return cache


def masked(cache: KVCache, key_mask: Tensor | None) -> KVCache:
    """Check a mask of the slots that exist against a checked cache, and put it there."""
    if key_mask is None:
        return cache
    lengths = cache.cache_seqlens
    tensors.mask("key_mask", key_mask, lengths.shape[0], lengths.device)
    return dataclasses.replace(cache, key_mask=key_mask)


def options(
    asked: Queries,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Options:
    """Check what a call asks of its scores and its mask."""
    if softmax_scale is not None:
        _finite("softmax_scale", softmax_scale, "a finite number, or None for head_dim ** -0.5")
    _finite("softcap", softcap, "a finite number, 0 or more (0 switches it off)")
    if softcap < 0:
        raise InvalidInput("softcap", softcap, "a finite number, 0 or more (0 switches it off)")
    _window(window_size)
    if alibi_slopes is not None:
        shapes = ((asked.heads,), (asked.batch, asked.heads))
        tensors.per_head("alibi_slopes", alibi_slopes, shapes, asked.q.device)
    if sinks is not None:
        tensors.per_head("sinks", sinks, ((asked.heads,),), asked.q.device, tensors.SINK_DTYPES)
    return Options.make(
        head_dim=asked.q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )


def num_splits(value: int) -> None:
    """Check a number of splits; 0 lets the planner choose."""
    if not isinstance(value, _INTEGERS) or not 0 <= value <= MAX_SPLITS:
        raise InvalidInput("num_splits", value, f"an int from 0 (let the planner choose) to {MAX_SPLITS}")


def _finite(name: str, value: float, wanted: str) -> None:
    if not isinstance(value, _NUMBERS) or not -math.inf < value < math.inf:
        raise InvalidInput(name, value, wanted)


def _window(window_size: tuple[int, int]) -> None:
    wanted = "two ints, (left, right), each -1 (unbounded) or more"
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise InvalidInput("window_size", window_size, wanted)
    for side in window_size:
        if not isinstance(side, _INTEGERS) or side < UNBOUNDED:
            raise InvalidInput("window_size", window_size, wanted)
