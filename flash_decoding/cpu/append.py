"""Write new keys and values into a cache, in place, with rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, NewTokens, Rotary


def append(new: NewTokens, cache: KVCache) -> None:
    """Write token ``i`` of every sequence to slot ``cache_seqlens + i``, up to the capacity.

    Tokens beyond it are not written. With ``new.rotary`` keys are rotated on their way, and ``new.q`` into
    ``new.q_rotated``.

    Raises:
        InvalidInput: a page or a row of the cache that does not exist; nothing has been written then.
    """
    steps = torch.arange(new.k.shape[1])
    starts = cache.cache_seqlens.long().clamp(min=0)[:, None]
    slots = starts + steps
    fits = slots < cache.capacity
    index = _locate(cache, slots, fits)
    k = new.k if new.rotary is None else _rotated(new.k, slots, new.rotary)
    if new.rotary is not None and new.q is not None and new.q_rotated is not None:
        q_steps = torch.arange(new.q.shape[1]) * new.rotary.advance_q
        new.q_rotated.copy_(_rotated(new.q, starts + q_steps, new.rotary))
    cache.k.index_put_(index, k[fits])
    cache.v.index_put_(index, new.v[fits])


def _locate(cache: KVCache, slots: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """The first two indices into k and v of the slots (batch, new_len) that fit, in their order."""
    batch = slots.shape[0]
    rows = torch.arange(batch) if cache.cache_batch_idx is None else cache.cache_batch_idx.long()
    available = cache.k.shape[0] if cache.block_table is None else cache.block_table.shape[0]
    _check("cache_batch_idx", rows, available)
    rows = rows[:, None].expand_as(slots)[fits]
    if cache.block_table is None:
        return rows, slots[fits]
    pages = cache.block_table[rows, slots[fits] // cache.page_size].long()
    _check("block_table", pages, cache.k.shape[0])
    return pages, slots[fits] % cache.page_size


def _check(argument: str, index: Tensor, size: int) -> None:
    wrong = index[(index < 0) | (index >= size)]
    if wrong.numel():
        raise InvalidInput(argument, wrong[0].item(), f"entries from 0 to {size - 1}")


def _rotated(x: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """x (batch, tokens, heads, head_dim) with its first ``rotary_dim`` elements turned by position.

    Computed in at least fp32 and rounded once. A position past the table takes its last row: no slot of the
    cache is that far.
    """
    positions = positions.expand(x.shape[:2]).clamp(max=rotary.cos.shape[0] - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[positions].to(dtype)[:, :, None] for table in (rotary.cos, rotary.sin))
    if rotary.interleaved:
        first, second = slice(0, rotary.rotary_dim, 2), slice(1, rotary.rotary_dim, 2)
    else:
        half = rotary.rotary_dim // 2
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first].to(dtype), x[..., second].to(dtype)
    turned = x.clone()
    turned[..., first] = (a * cos - b * sin).to(x.dtype)
    turned[..., second] = (a * sin + b * cos).to(x.dtype)
    return turned
