"""Small caches, and a way to write and read them without any kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flash_decoding.cache import ContiguousCache, PagedCache
from flash_decoding.spec import KVCache

Cache = ContiguousCache | PagedCache


def contiguous(batch: int = 3, capacity: int = 12, layers: int = 1) -> ContiguousCache:
    return ContiguousCache(
        batch, capacity, heads_kv=1, head_dim=2, head_dim_v=1, layers=layers, dtype=torch.float32
    )


def paged(batch: int = 3, num_pages: int = 6, page_size: int = 3, layers: int = 1) -> PagedCache:
    return PagedCache(
        num_pages,
        page_size,
        1,
        2,
        head_dim_v=1,
        max_batch=batch,
        max_pages=4,
        layers=layers,
        dtype=torch.float32,
    )


BOTH: list[Callable[[], Cache]] = [contiguous, paged]


def slots_of(seen: KVCache, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The filled slots of a row, found the way a kernel finds them: views of keys and values."""
    length = int(seen.cache_seqlens[row])
    if seen.block_table is None:
        return seen.k[row, :length], seen.v[row, :length]
    slots = torch.arange(length)
    pages = seen.block_table[row, slots // seen.page_size].long()
    return seen.k[pages, slots % seen.page_size], seen.v[pages, slots % seen.page_size]


def write(cache: Cache, row: int, tokens: list[int]) -> None:
    """A step of one row: its tokens count, and go where an append kernel would put them, in every layer."""
    cache.advance(len(tokens), row)
    for layer in range(cache.keys.shape[0]):
        target = cache.writing(layer, row)
        table = target["block_table"]
        for slot, token in enumerate(tokens, int(target["cache_seqlens"])):
            place = (0, slot)
            if table is not None:
                page_size = target["k_cache"].shape[1]
                place = (int(table[0, slot // page_size]), slot % page_size)
            target["k_cache"][place], target["v_cache"][place] = token + layer, -token - layer


def append(cache: Cache, row: int, tokens: list[int]) -> None:
    cache.allocate(len(tokens), row)
    write(cache, row, tokens)


def read(cache: Cache, row: int, layer: int = 0) -> list[int]:
    k, v = slots_of(cache.view(layer), row)
    assert torch.equal(k[..., :1], -v), "keys and values went to different places"
    return [int(token) - layer for token in k[:, 0, 0]]
