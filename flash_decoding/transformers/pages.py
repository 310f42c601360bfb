"""One layer's share of Transformers' paged cache: the one place that knows how its releases lay it out.

===========  =====================================================================================
to 5.17      layers in groups of equal size; a group has a pool of keys and one of values for each place
5.18         an allocator for each kind of layer, which cuts pages for all of them from one tensor
5.19, later  as 5.18; ``update`` takes all that is known of a batch, and finds the layer's share by itself
===========  =====================================================================================

Which one it is shows in what the objects can do, so that releases in between need no table of versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as Transformers calls them."""

_NO_WINDOW = 1
"""How groups of layers write that they have no window."""


class Groups(Protocol):
    """A paged cache as releases up to 5.17 have it."""

    sliding_windows: Mapping[int, int]
    layer_index_to_group_indices: Mapping[int, tuple[int, int]]
    block_size: int
    key_cache: Sequence[Tensor]
    value_cache: Sequence[Tensor]


class Allocator(Protocol):
    """Where a kind of layers has its pages; one for windows has ``sliding_window``, too."""

    index: int

    def get_cache_for_block_table(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (pages, page_size, heads_kv, head_dim).

        Args:
            layer_idx: the layer.
        """


@dataclass(frozen=True, eq=False)
class Pages:
    """Where a layer has its keys and values.

    ``window`` is how many keys of a request are kept (None: all), ``row`` says which block table of a batch
    is the layer's.
    """

    window: int | None
    row: int
    cache: Any
    layer: int

    @classmethod
    def of(cls, cache: Any, layer: int) -> Pages:
        """Look a layer up.

        Args:
            cache: Transformers' paged cache.
            layer: place of the layer in the model.
        """
        if hasattr(cache, "layer_to_allocator"):
            allocator: Allocator = cache.layer_to_allocator[layer]
            return cls(getattr(allocator, "sliding_window", None), allocator.index, cache, layer)
        groups: Groups = cache
        row, _ = groups.layer_index_to_group_indices[layer]
        kept = groups.sliding_windows[layer]
        return cls(None if kept == _NO_WINDOW else kept, row, cache, layer)

    @property
    def kind(self) -> str:
        """What the lengths of a batch that hold for the layer go by."""
        return FULL if self.window is None else SLIDING

    def pools(self) -> tuple[Tensor, Tensor]:
        """Keys and values in place, (pages, page_size, heads_kv, head_dim) each."""
        if hasattr(self.cache, "layer_to_allocator"):
            allocator: Allocator = self.cache.layer_to_allocator[self.layer]
            return allocator.get_cache_for_block_table(self.layer)
        groups: Groups = self.cache
        _, place = groups.layer_index_to_group_indices[self.layer]
        keys, values = groups.key_cache[place], groups.value_cache[place]
        shape = (-1, groups.block_size, *keys.shape[1:])
        return keys.view(shape), values.view(shape)

    def update(self, key: Tensor, value: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Let the cache write new tokens, and gather what they attend to.

        Args:
            key: (1, heads_kv, tokens, head_dim).
            value: the same shape.
            batch: arguments of attention, which stay as they are.

        Returns:
            Keys and values, (tokens, heads_kv, head_dim) each, of all requests one after the other.
        """
        new: dict[str, Any] = {"key_states": key, "value_states": value, "layer_idx": self.layer}
        if "max_seqlen_k" in batch:
            indices = {name: batch[name] for name in ("read_index", "write_index")}
            k, v = self.cache.update(**new, **indices)
            return k, v
        # Since the release that renamed the longest lengths, update picks from a dict, and changes it.
        k, v = self.cache.update(**new, kwargs=dict(batch))
        return k[0].transpose(0, 1), v[0].transpose(0, 1)
