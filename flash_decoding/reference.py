"""The specification: attention over a cache in eager PyTorch, sequence by sequence, with nothing clever.

Every edge case is decided here. Optimised code is tested against this file and never imports it. It runs
on any device, in any floating dtype (float64 by default), and touches live slots alone, whatever the others
hold.

Partials. Attention over a range of slots (``key_range``) gives an output and an LSE of its own, and
:func:`merge` puts ranges together again: those that cover every slot once merge to the attention over all.
A sink is not a key in a slot: it belongs to whoever asks for it. Give it to exactly one of the partials (the
others get ``options`` without sinks), or it counts as often as it was given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_decoding.spec import KVCache, NewTokens, Options, Queries, Rotary


def attend(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    key_range: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention of every query token over the live slots of its sequence.

    Args:
        queries: dense or ragged.
        cache: contiguous or paged; ``length = min(cache_seqlens + new_tokens, capacity)``.
        options: scale, mask and biases.
        key_range: only slots ``lo <= slot < hi``, for a partial; positions stay those of the whole.
        dtype: in which everything is computed and returned.

    Returns:
        out, like q with head_dim_v as last dimension, and the natural-log LSE, (batch, heads_q, q_len) or
        (heads_q, total_q) where ragged; both in ``dtype``. A row that sees no key has output 0 and LSE -inf,
        or the sink as LSE where there is one.
    """
    outs, lses = [], []
    for b in range(queries.batch):
        length = _length(cache, b)
        start = 0 if cache.cache_leftpad is None else int(cache.cache_leftpad[b])
        lo, hi = (0, length) if key_range is None else key_range
        slots = torch.arange(max(start, lo), max(start, lo, min(length, hi)), device=queries.q.device)
        slots = slots[_exist(cache, b, slots)]
        index = _locate(cache, b, slots)
        q, k, v = _query_tokens(queries, b).to(dtype), cache.k[index].to(dtype), cache.v[index].to(dtype)
        distance = slots - (length - q.shape[0] + torch.arange(q.shape[0], device=q.device))[:, None]
        scores = _scores(q, k, distance, options, b)
        out, lse = _softmax_product(scores, v, options.sinks)
        outs.append(out)
        lses.append(lse)
    if queries.is_ragged:
        return torch.cat(outs), torch.cat(lses, dim=1)
    return torch.stack(outs), torch.stack(lses)


def _query_tokens(queries: Queries, b: int) -> Tensor:
    """(q_len, heads_q, head_dim)."""
    if queries.cu_seqlens_q is None:
        return queries.q[b]
    start, stop = queries.cu_seqlens_q[b : b + 2].tolist()
    return queries.q[start:stop]


def _length(cache: KVCache, b: int) -> int:
    """Where sequence ``b`` ends; its last query token sits at slot ``length - 1``."""
    return min(max(int(cache.cache_seqlens[b]), 0) + cache.new_tokens, cache.capacity)


def _exist(cache: KVCache, b: int, slots: Tensor) -> Tensor:
    """Which of the slots ``key_mask`` leaves to sequence ``b``."""
    if cache.key_mask is None:
        return torch.ones_like(slots, dtype=torch.bool)
    exist = slots < cache.key_mask.shape[1]
    exist[exist.clone()] = cache.key_mask[b, slots[exist]]
    return exist


def _locate(cache: KVCache, b: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Where the slots of sequence ``b`` lie: the first two indices into k and v."""
    row = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
    if cache.block_table is None:
        return torch.full_like(slots, row), slots
    return cache.block_table[row, slots // cache.page_size].long(), slots % cache.page_size


def _scores(q: Tensor, k: Tensor, distance: Tensor, options: Options, b: int) -> Tensor:
    """(heads_q, q_len, keys); ``distance`` (q_len, keys) is slot - position. Hidden keys score -inf."""
    q_len, heads_q, head_dim = q.shape
    grouped = q.reshape(q_len, k.shape[1], heads_q // k.shape[1], head_dim)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, k).flatten(0, 1)
    scores = scores * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes[b] if options.alibi_slopes.dim() == 2 else options.alibi_slopes
        scores = scores - slopes.to(scores.dtype)[:, None, None] * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool)
    if options.window_left >= 0:
        visible &= distance >= -options.window_left
    if options.window_right >= 0:
        visible &= distance <= options.window_right
    return scores.masked_fill(~visible, -math.inf)


def _softmax_product(scores: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (q_len, heads_q, head_dim_v) and LSE (heads_q, q_len) of scores (heads_q, q_len, keys)."""
    lse = scores.logsumexp(dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    weights = torch.exp(scores - _finite(lse)[..., None])
    grouped = weights.reshape(v.shape[1], weights.shape[0] // v.shape[1], *weights.shape[1:])
    out = torch.einsum("hgqk,khe->qhge", grouped, v)
    return out.flatten(1, 2), lse


def _finite(lse: Tensor) -> Tensor:
    """-inf replaced by 0, so that subtracting it from another -inf stays -inf and not NaN."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Put partial results over disjoint keys together.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v), any floating dtype.
        lses: (splits, batch, heads_q, q_len), natural log; -inf for a partial that saw nothing, whose out
            then does not count whatever it holds.

    Returns:
        out (batch, q_len, heads_q, head_dim_v) and lse (batch, heads_q, q_len), in the wider of both dtypes.
        Empty partials merge to an empty one: out 0, LSE -inf.
    """
    dtype = torch.promote_types(outs.dtype, lses.dtype)
    lse = lses.to(dtype).logsumexp(dim=0)
    weights = torch.exp(lses.to(dtype) - _finite(lse)).transpose(-1, -2)[..., None]
    return torch.where(weights > 0, weights * outs.to(dtype), 0.0).sum(dim=0), lse


def append(new: NewTokens, cache: KVCache) -> None:
    """Write new keys and values behind ``cache_seqlens``, in place, and rotate q alongside.

    Token ``i`` of sequence ``b`` goes to slot ``cache_seqlens[b] + i``; beyond the capacity nothing is
    written. ``cache.new_tokens`` plays no part here. Rotation is computed in float64 and rounded once.
    A position past the table of ``rotary``, which no cache could hold, takes its last row.
    """
    for b in range(new.k.shape[0]):
        seqlen = max(int(cache.cache_seqlens[b]), 0)
        k, slots = new.k[b], seqlen + torch.arange(new.k.shape[1], device=new.k.device)
        if new.rotary is not None:
            k = rotate(k, slots, new.rotary)
        fits = slots < cache.capacity
        index = _locate(cache, b, slots[fits])
        cache.k[index] = k[fits]
        cache.v[index] = new.v[b, fits]
        if new.rotary is not None and new.q is not None and new.q_rotated is not None:
            steps = torch.arange(new.q.shape[1], device=k.device) * new.rotary.advance_q
            new.q_rotated[b] = rotate(new.q[b], seqlen + steps, new.rotary)


def rotate(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Turn the first ``rotary_dim`` elements of x (tokens, heads, head_dim), pair by pair, by its position.

    A pair (a, b) becomes (a cos - b sin, a sin + b cos). The rest of x is returned as it is.
    """
    positions = positions.clamp(max=rotary.cos.shape[0] - 1)
    cos, sin = (table[positions].double()[:, None, :] for table in (rotary.cos, rotary.sin))
    first, second = _pairs(rotary)
    a, b = x[..., first].double(), x[..., second].double()
    turned = x.clone()
    turned[..., first] = (a * cos - b * sin).to(x.dtype)
    turned[..., second] = (a * sin + b * cos).to(x.dtype)
    return turned


def _pairs(rotary: Rotary) -> tuple[slice, slice]:
    """Which elements turn together."""
    if rotary.interleaved:
        return slice(0, rotary.rotary_dim, 2), slice(1, rotary.rotary_dim, 2)
    half = rotary.rotary_dim // 2
    return slice(0, half), slice(half, 2 * half)
