"""New tokens on their way into a cache, and partial results on their way into one."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, NewTokens, Rotary
from flash_decoding.validate import inputs, tensors, values


def append_cache(
    k: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
) -> KVCache:
    """Check a cache against the keys that it is about to receive, (batch, new_len, heads_kv, head_dim)."""
    tensors.leading("k", k, "(batch, new_len, heads_kv, head_dim)", 4)
    if cache_seqlens is None:
        raise InvalidInput("cache_seqlens", None, "an int or a (batch,) int32 tensor: where new tokens go")
    batch, new_len = k.shape[:2]
    names = ("k", "k_cache", "v_cache")
    capacity = inputs.layout(
        k, batch, k_cache, v_cache, block_table=block_table, cache_batch_idx=cache_batch_idx, names=names
    )
    seqlens = inputs.lengths(cache_seqlens, batch, capacity, k.device, new_len)
    cache = KVCache(k_cache, v_cache, seqlens, block_table, cache_batch_idx, new_tokens=new_len)
    if values.wanted(k):
        values.cache(cache, written_only=True)
    return cache


def new_len(k: Tensor | None, v: Tensor | None) -> int:
    """Tokens to append; keys and values come together or not at all."""
    if k is None and v is None:
        return 0
    for name, x, other in (("k", k, "v"), ("v", v, "k")):
        if x is None:
            raise InvalidInput(name, None, f"new tokens to go with {other}")
        tensors.view(name, x, "(batch, new_len, heads_kv, head_dim)", 4)
    return 0 if k is None else k.shape[1]


def new_tokens(
    k: Tensor, v: Tensor, cache: KVCache, *, rotation: Rotary | None = None, q: Tensor | None = None
) -> NewTokens:
    """Check keys and values against a checked cache, and make room for the rotated queries."""
    tensors.like("k", k, "k_cache", cache.k)
    tensors.like("v", v, "k_cache", cache.k)
    batch, new_len = cache.cache_seqlens.shape[0], k.shape[1]
    wanted = (batch, new_len, cache.heads, cache.k.shape[3])
    if tuple(k.shape) != wanted or new_len == 0:
        raise InvalidInput("k", tensors.shape_of(k), f"{wanted}: (batch, new_len >= 1, heads_kv, head_dim)")
    wanted = (batch, new_len, cache.heads, cache.v.shape[3])
    if tuple(v.shape) != wanted:
        raise InvalidInput("v", tensors.shape_of(v), f"{wanted}: (batch, new_len, heads_kv, head_dim_v)")
    if new_len > cache.capacity:
        raise InvalidInput("k", f"{new_len} new tokens", f"at most {cache.capacity}, the slots of a sequence")
    _writable("k_cache", cache.k)
    _writable("v_cache", cache.v)
    if q is not None:
        _rotated_queries(q, k, rotation)
    if rotation is not None:
        _rotation(rotation, cache)
    return NewTokens(k, v, rotation, q, None if q is None else q.new_empty(q.shape))


def rotary(cos: Tensor | None, sin: Tensor | None, *, interleaved: bool, advance_q: bool) -> Rotary | None:
    """Pair the rotary tables, which come together or not at all."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        missing, given = ("rotary_cos", "rotary_sin") if cos is None else ("rotary_sin", "rotary_cos")
        raise InvalidInput(missing, None, f"the table that goes with {given}")
    tensors.view("rotary_cos", cos, "(positions, rotary_dim // 2)", 2)
    return Rotary(cos, sin, interleaved, advance_q)


def partials(outs: Tensor, lses: Tensor) -> None:
    """Check partial results to be merged, (splits, batch, q_len, heads_q, head_dim_v) and their LSEs.

    Ragged ones lack ``batch``: (splits, total_q, heads_q, head_dim_v) and (splits, heads_q, total_q).
    """
    ragged = isinstance(outs, Tensor) and outs.ndim == 4
    shape = "(splits, batch, q_len, heads_q, head_dim_v) or (splits, total_q, heads_q, head_dim_v)"
    tensors.view("outs", outs, shape, 4 if ragged else 5)
    tensors.floats("outs", outs)
    tensors.no_grad("outs", outs)
    if 0 in outs.shape:
        raise InvalidInput("outs", tensors.shape_of(outs), f"{shape} without a zero")
    *front, tokens, heads_q, _ = outs.shape
    tensors.view("lses", lses, "(splits, [batch,] heads_q, q_len or total_q)", outs.ndim - 1)
    if lses.dtype != torch.float32:
        raise InvalidInput("lses", lses.dtype, "torch.float32")
    if tuple(lses.shape) != (*front, heads_q, tokens):
        raise InvalidInput("lses", tensors.shape_of(lses), f"{(*front, heads_q, tokens)}, to go with outs")
    tensors.same_device("lses", lses, outs.device)
    tensors.no_grad("lses", lses)


def _writable(name: str, pool: Tensor) -> None:
    for stride, size in zip(pool.stride(), pool.shape, strict=True):
        if stride == 0 and size > 1:
            raise InvalidInput(
                name, f"strides {pool.stride()}", "no stride of 0: each slot needs its own memory"
            )


def _rotated_queries(q: Tensor, k: Tensor, rotation: Rotary | None) -> None:
    if rotation is None:
        raise InvalidInput(
            "q", "queries without rotary_cos", "queries only together with rotary_cos and rotary_sin"
        )
    tensors.like("q", q, "k", k)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or 0 in q.shape:
        wanted = f"({k.shape[0]}, q_len, heads_q, {k.shape[3]}), as k"
        raise InvalidInput("q", tensors.shape_of(q), wanted)


def _rotation(rotation: Rotary, cache: KVCache) -> None:
    for name, table in (("rotary_cos", rotation.cos), ("rotary_sin", rotation.sin)):
        tensors.view(name, table, "(positions, rotary_dim // 2)", 2)
        if table.dtype != cache.k.dtype:
            raise InvalidInput(name, table.dtype, f"{cache.k.dtype}, the dtype of k")
        tensors.same_device(name, table, cache.k.device)
        tensors.no_grad(name, table)
    if rotation.sin.shape != rotation.cos.shape:
        wanted = f"{tensors.shape_of(rotation.cos)}, the shape of rotary_cos"
        raise InvalidInput("rotary_sin", tensors.shape_of(rotation.sin), wanted)
    head_dim = cache.k.shape[3]
    if not 0 < rotation.rotary_dim <= head_dim:
        raise InvalidInput(
            "rotary_cos", f"rotary_dim {rotation.rotary_dim}", f"2 to {head_dim}, the head_dim"
        )
    if rotation.cos.shape[0] < cache.capacity:
        wanted = f"{cache.capacity} or more, one per slot of a sequence"
        raise InvalidInput("rotary_cos", f"{rotation.cos.shape[0]} positions", wanted)
