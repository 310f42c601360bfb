"""vLLM's ``paged_attention_v1``, heir of FasterTransformer's kernel: one block per sequence and query head.

It reads a layout of its own: keys as (pages, heads_kv, head_dim / x, PAGE, x) with 16 bytes in x, values as
(pages, heads_kv, head_dim, PAGE). So a copy of each layer's cache is kept in it, to which every step adds its
token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_decoding.spec import KVCache, Options, Queries

PAGE = 16
"""Tokens in a page."""


class VllmBlock:
    """Attention of one token per sequence; one for each decoder, since it copies what the cache holds."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}

    def __call__(self, queries: Queries, cache: KVCache, options: Options) -> Tensor:
        """(batch, 1, heads_q, head_dim) from a contiguous cache; the first call of a layer copies it."""
        layer = cache.k.data_ptr()
        if layer not in self._copies:
            self._copies[layer] = _Copy(cache)
        copy = self._copies[layer]
        copy.append(cache)
        return copy.attend(queries.q, cache, options.softmax_scale)


class _Copy:
    """A layer's keys and values in vLLM's layout."""

    def __init__(self, cache: KVCache) -> None:
        batch, _, heads, head_dim = cache.k.shape
        x = 16 // cache.k.element_size()
        k = cache.k.reshape(-1, PAGE, heads, head_dim // x, x)
        self._k = k.permute(0, 2, 3, 1, 4).contiguous()
        self._v = cache.v.reshape(-1, PAGE, heads, head_dim).permute(0, 2, 3, 1).contiguous()
        device = cache.k.device
        self._rows = torch.arange(batch, device=device)
        self._pages = torch.arange(self._k.shape[0], dtype=torch.int32, device=device).view(batch, -1)
        self._one = torch.ones((), dtype=torch.float32, device=device)

    def append(self, cache: KVCache) -> None:
        """Take over the token that the step has written to the cache."""
        from vllm import _custom_ops

        slots = cache.cache_seqlens.long()
        new = (x[self._rows, slots] for x in (cache.k, cache.v))
        places = self._rows * cache.capacity + slots
        _custom_ops.reshape_and_cache(*new, self._k, self._v, places, "auto", self._one, self._one)

    def attend(self, q: Tensor, cache: KVCache, scale: float) -> Tensor:
        """The kernel itself."""
        from vllm import _custom_ops

        out = torch.empty_like(q)
        lengths = cache.cache_seqlens + cache.new_tokens
        sizes = (PAGE, cache.capacity, None, "auto", self._one, self._one)
        _custom_ops.paged_attention_v1(
            out[:, 0], q[:, 0], self._k, self._v, cache.heads, scale, self._pages, lengths, *sizes
        )
        return out
