"""Key/value caches for those who build engines: storage, lengths, and pages.

A cache holds tensors whose addresses never change and rows, one for each sequence of a batch. Two counts are
kept for a row, because two sides need them without asking each other:

- ``lengths``, on the host: how many slots the row may fill. ``allocate`` raises it, or raises
  :class:`~flash_decoding.errors.CacheFull` before anything is written.
- ``cache_seqlens``, on the device: how many slots it fills. ``advance`` raises it, in place and without a
  host sync, so a CUDA graph may contain it.

A decoding step of ``n`` tokens::

    cache.allocate(n)  # host: outside of a captured graph, like free, truncate, fork and reorder
    cache.advance(n)
    for layer in range(layers):
        append_kv(k, v, **cache.writing(layer))
        out = decode_attention(q, **cache.reading(layer))

Prompts go the same way, with ``rows=`` for those that have one.
"""

from flash_decoding.cache.contiguous import ContiguousCache
from flash_decoding.cache.paged import PagedCache

__all__ = ["ContiguousCache", "PagedCache"]
