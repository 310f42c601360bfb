"""Key/value caches for those who build engines: storage, lengths, and pages.

A cache holds tensors whose addresses never change and rows, one for each sequence of a batch. Two counts are
kept for a row, because two sides need them without asking each other:

- ``lengths``, on the host: how many slots the row may fill. ``allocate`` raises it, or raises
  :class:`~flash_decoding.errors.CacheFull` before anything is written.
- ``cache_seqlens``, on the device: how many slots it has filled. ``advance`` raises it, in place and without
  a host sync, so a CUDA graph may contain it.

One decoding step is ``allocate(1)``, append and attend for each layer, ``advance(1)``. With a captured graph,
``allocate`` (like ``free``, ``truncate``, ``fork`` and ``reorder``) stays outside, before the replay.
"""

from flash_decoding.cache.contiguous import ContiguousCache
from flash_decoding.cache.paged import PagedCache

__all__ = ["ContiguousCache", "PagedCache"]
