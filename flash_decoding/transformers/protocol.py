"""What Transformers asks of a cache, answered by the steps of ours."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.transformers.handle import CachedKeys
from flash_decoding.transformers.steps import Steps


class FlashLayer(CacheLayerMixin):
    """One layer of a cache, as far as Transformers asks for it: layers share lengths, and change together."""

    is_compileable = False
    is_croppable = True
    is_sliding = False  # windows are the business of attention, which starts at their edge

    def __init__(self, steps: Steps, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps, self._index = steps, index
        self.keys = self.values = cast("Tensor", CachedKeys(steps.storage.view(index)))
        self.is_initialized = True

    def update(  # type: ignore[override]  # handles take the place of tensors, which is the point
        self, key_states: Tensor, value_states: Tensor, *, kwargs: Mapping[str, Any] | None = None
    ) -> tuple[CachedKeys, CachedKeys]:
        """Append new tokens, as :meth:`FlashCacheProtocol.update`.

        Args:
            key_states: (rows, heads_kv, q_len, head_dim).
            value_states: (rows, heads_kv, q_len, head_dim_v).
            kwargs: not looked at.
        """
        handle = CachedKeys(self._steps.append(key_states, value_states, self._index))
        return handle, handle

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._steps.seq_length(self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a mask covers, and the first of them.

        Args:
            query_length: tokens of the forward that is about to begin.
        """
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self._steps.storage.capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do.

        Args:
            key_states: not looked at.
            value_states: not looked at.
        """

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise Unsupported(
            "changing one layer of a FlashCache", ("layers share lengths: ask the cache itself",)
        )

    reset = reorder_cache = crop = offload = prefetch = _refuse
    batch_repeat_interleave = batch_select_indices = _refuse


class FlashCacheProtocol(Cache):
    """The methods of :class:`~flash_decoding.transformers.FlashCache` that Transformers calls.

    Args:
        steps: of the cache.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        super().__init__(layers=[FlashLayer(steps, index) for index in range(steps.layers)])

    def update(  # type: ignore[override]  # handles take the place of tensors, which is the point
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *,
        kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[CachedKeys, CachedKeys]:
        """Append a layer's new tokens.

        Args:
            key_states: (rows, heads_kv, q_len, head_dim), dtype and device of the cache.
            value_states: (rows, heads_kv, q_len, head_dim_v).
            layer_idx: the layer; they come in order.
            kwargs: what attention will get besides, from Transformers 5.24 on. A cache may leave word for
                attention there; ours does so by what it returns. What is asked of attention in it is honoured
                or refused by attention itself, which gets all of it.

        Returns:
            Twice the same handle, for attention.

        Raises:
            CacheFull: no room for them; nothing has changed.
            InvalidInput: shapes, dtype or device that do not fit the cache; layers out of order.
        """
        handle = CachedKeys(self._steps.append(key_states, value_states, layer_idx))
        return handle, handle

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest row, known on the host; the layer's share of an open step counts.

        Args:
            layer_idx: the layer that asks.
        """
        return self._steps.seq_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity of every layer.

        Args:
            layer_idx: any layer, or None.
        """
        return self._steps.storage.capacity

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take tokens away from all rows in use.

        Args:
            tokens_to_remove: so many, as a negative number. A positive one is the length to shorten to, as
                Transformers had it before.

        Raises:
            InvalidInput: more than a row has.
        """
        lengths = list(self._steps.storage.lengths)
        removed = operator.index(tokens_to_remove)  # assisted decoding brings it as a tensor
        for row in range(self._steps.in_use):
            if removed < 0:
                lengths[row] += removed
            elif removed > 0:
                lengths[row] = min(lengths[row], removed)
        self._steps.truncate(lengths)

    def reset(self) -> None:
        """Empty all rows; the next forward may have another batch."""
        self._steps.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on as a copy of another: a step of beam search.

        Args:
            beam_idx: (rows,) integers. They are read on the host, which waits for the device.
        """
        sources = beam_idx.tolist()
        if len(sources) != self._steps.in_use:
            raise InvalidInput("beam_idx", f"{len(sources)} rows", f"{self._steps.in_use}, the rows in use")
        self._steps.select(sources)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row in use, up to the batch of the cache.

        Args:
            repeats: copies of each row, itself among them.
        """
        self._steps.select([row for row in range(self._steps.in_use) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, and free the others.

        Args:
            indices: (rows,) integers, read on the host; or a mask of booleans.
        """
        kept = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._steps.select(kept.tolist())

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Everything is allocated from the start: see that it is what the caller expects.

        Args:
            batch_size: at most the batch of the cache.
            num_heads: key/value heads.
            head_dim: elements of a key.
            dtype: of keys and values.
            device: where they lie.
        """
        keys, batch = self._steps.storage.keys, self._steps.storage.batch
        heads, elements = ({n} if isinstance(n, int) else set(n) for n in (num_heads, head_dim))
        if batch_size > batch or (heads, elements) != ({keys.shape[3]}, {keys.shape[4]}):
            wanted = f"at most {batch} rows of {keys.shape[3]} heads of {keys.shape[4]} elements"
            raise InvalidInput("batch_size, num_heads, head_dim", (batch_size, num_heads, head_dim), wanted)
        if (dtype, torch.device(device).type) != (keys.dtype, keys.device.type):
            raise InvalidInput("dtype, device", (dtype, device), f"{keys.dtype} on {keys.device}")

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Refused: keys and values stay where they are."""
        raise Unsupported("offloading of a FlashCache", ("its tensors never move",))

    @property
    def batch_size(self) -> int:
        """Rows in use; all of them while the cache is empty."""
        return self._steps.in_use
