"""One layer's share of Transformers' paged cache: the one place that knows how its releases lay it out.

===========  =====================================================================================
to 5.17      layers in groups of equal size; a group has a pool of keys and one of values for each place
5.18         an allocator for each kind of layer, which cuts pages for all of them from one tensor
5.19         as 5.18; ``update`` takes all that is known of a batch, and finds the layer's share by itself
5.24, later  as 5.19; a layer calls ``update`` before attention, which gets its share and not the cache
===========  =====================================================================================

Which one it is shows in what the objects can do, so that releases in between need no table of versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from flash_decoding.errors import Unsupported

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
    """Where a layer has its keys and values, looked up in the cache; attention is the one to update it.

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

    def own(self, lengths: Any) -> Any:
        """Of lengths by the kind of layers, those of the layer; models with one kind may have them bare.

        Args:
            lengths: of keys: where each request begins, or the longest.
        """
        return lengths[FULL if self.window is None else SLIDING] if isinstance(lengths, dict) else lengths

    def table(self, batch: Mapping[str, Any]) -> Tensor:
        """The layer's block table, (requests, pages of each).

        Args:
            batch: arguments of attention.
        """
        table: Tensor = batch["block_table"][self.row]
        return table

    def pools(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values in place, (pages, page_size, heads_kv, head_dim) each.

        Args:
            batch: not looked at: the cache has them.
        """
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


@dataclass(frozen=True, eq=False)
class Updated:
    """The share of a layer that has updated the cache itself: what is left to know is among the arguments."""

    window: int | None
    layer: int

    @classmethod
    def of(cls, layer: Any) -> Updated:
        """Read the window from the configuration, as the cache did: it has passed by.

        Args:
            layer: of the model; its ``layer_idx`` is its place there.
        """
        config, place = layer.config, layer.layer_idx
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        return cls(window if kinds is None or kinds[place] == SLIDING else None, place)

    def own(self, lengths: Any) -> Any:
        """The lengths as they are: ``update`` has left those of the layer.

        Args:
            lengths: of keys: where each request begins, or the longest.
        """
        if isinstance(lengths, dict):
            why = "layers that use each other's keys are not known here"
            raise Unsupported(f"layer {self.layer}, which has not updated the paged cache", (why,))
        return lengths

    def table(self, batch: Mapping[str, Any]) -> Tensor:
        """The layer's block table, (requests, pages of each).

        Args:
            batch: arguments of attention.
        """
        table: Tensor = batch["block_table"]
        return table

    def pools(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values in place, (pages, page_size, heads_kv, head_dim) each.

        Args:
            batch: arguments of attention.
        """
        return batch["k_cache"], batch["v_cache"]

    def update(self, key: Tensor, value: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values, (tokens, heads_kv, head_dim) each: old and new ones of all requests are there.

        Args:
            key: (1, heads_kv, tokens, head_dim).
            value: the same shape.
            batch: not looked at.
        """
        return key[0].transpose(0, 1), value[0].transpose(0, 1)


Share: TypeAlias = Pages | Updated


def share_of(layer: Any, batch: Mapping[str, Any]) -> Share:
    """A layer's share, from the cache where attention gets it.

    Args:
        layer: of the model.
        batch: arguments of attention.
    """
    cache = batch.get("cache")
    return Updated.of(layer) if cache is None else Pages.of(cache, layer.layer_idx)
