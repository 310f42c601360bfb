"""A cache for Transformers' models that keeps keys and values where our kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig

from flash_decoding.cache import PagedCache
from flash_decoding.spec import KVCache
from flash_decoding.transformers.protocol import FlashCacheProtocol
from flash_decoding.transformers.sizes import CacheSizes, allocate, check_room, pages_of
from flash_decoding.transformers.steps import Steps


class FlashCache(FlashCacheProtocol):
    """Keys and values of all layers, allocated once and appended in place::

        cache = FlashCache(model.config, batch=1, capacity=65536, dtype=model.dtype, device=model.device)
        model.generate(**inputs, past_key_values=cache)

    Lengths lie on the device, and attention reads live tokens only. The model has to run with
    ``attn_implementation="flash_decoding"``: what its layers get from :meth:`update` is no tensor but
    :class:`~flash_decoding.transformers.handle.CachedKeys`, which other implementations cannot read.

    Transformers calls ``past_key_values`` by the name of ``cache`` from 5.24 on, and still takes the old one.

    ``generate`` and plain forwards need nothing else. An empty cache takes any batch up to its own; from then
    on a forward brings as many rows. Its first layer begins a step: room for all rows, or
    :class:`~flash_decoding.errors.CacheFull` before anything is written. Each layer then appends with one
    launch, and nothing waits for the device. A forward that fails half-way leaves the step open, which the
    next one is told; :meth:`truncate` or :meth:`reset` end it.

    Those who drive a model themselves open the steps. The host's part is then done before the forward, so
    that the forward may be a captured graph::

        with cache.step(1):                      # room, counted on the host
            with torch.cuda.graph(graph):        # captured, not run
                logits = model(tokens, past_key_values=cache, position_ids=cache.positions(1))
            graph.replay()
        with cache.step(1):
            graph.replay()                       # another token, in the same graph
        with cache.step([1, 0, 1]):
            graph.replay()                       # row 1 has ended: it keeps its length
        with cache.step([7, 3], rows=[0, 2]):    # chunks of two prompts, padded on the right to 7 columns
            model(chunk, past_key_values=cache, position_ids=cache.positions(7))
        cache.truncate([9, 4, 6])                # lengths go back: rejected drafts

    - A row counts its own tokens only. Columns beyond them are padding: what they write is never live, and
      what the model gives for them is noise.
    - Inside a step, forwards and :meth:`positions` concern its rows. If anything inside fails, the lengths
      are as before.
    - One forward runs in a step, or a replay of one in its place, or kernels that append on their own:
      :meth:`begin` gives these what they need.
    - A captured forward is right for all later steps of the same ``q_len`` over the same rows, if these are
      neighbours (all rows, or a slice); tensors never move.

    Args:
        config: of the model; nested ones give their text model.
        batch: most rows: sequences, times beams.
        capacity: slots of a row; rounded up to whole pages.
        page_size: slots of a page; 0 for a contiguous cache.
        num_pages: pages of the pool that rows share; enough for all rows if None. A smaller pool is full when
            its pages are used, whatever the capacity.
        dtype: of keys and values, the model's; that of the configuration if None.
        device: where all tensors lie, the model's.

    Attributes:
        storage: the :class:`~flash_decoding.ContiguousCache` or :class:`~flash_decoding.PagedCache` of all
            layers.

    Raises:
        Unsupported: the model's layers do not all keep keys and values of the same sizes.
        InvalidInput: sizes that no cache can have.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        batch: int,
        capacity: int,
        page_size: int = 0,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = CacheSizes.of(config, dtype)
        check_room(batch=batch, capacity=capacity, page_size=page_size, num_pages=num_pages)
        self.storage = allocate(
            sizes, batch=batch, capacity=capacity, page_size=page_size, num_pages=num_pages, device=device
        )
        super().__init__(Steps(self.storage))

    @staticmethod
    def bytes_for(
        config: PretrainedConfig,
        *,
        batch: int,
        capacity: int,
        page_size: int = 0,
        num_pages: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Bytes of keys and values that a cache of these sizes will take; nothing is allocated.

        Args:
            config: as for the cache, like all that follow.
            batch: most rows.
            capacity: slots of a row.
            page_size: slots of a page; 0 for a contiguous cache.
            num_pages: pages of the pool; enough for all rows if None.
            dtype: of keys and values.
        """
        sizes = CacheSizes.of(config, dtype)
        check_room(batch=batch, capacity=capacity, page_size=page_size, num_pages=num_pages)
        slots = batch * capacity
        if page_size:
            slots = ((num_pages or batch * pages_of(capacity, page_size)) + 1) * page_size
        return slots * sizes.token_bytes

    def memory(self) -> int:
        """Bytes of keys and values, used or not."""
        return self.storage.keys.nbytes + self.storage.values.nbytes

    @property
    def batch(self) -> int:
        return self.storage.batch

    @property
    def capacity(self) -> int:
        return self.storage.capacity

    @property
    def page_size(self) -> int:
        return self.storage.page_size if isinstance(self.storage, PagedCache) else 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row of the cache (host)."""
        return list(self.storage.lengths)

    @property
    def rows(self) -> list[int]:
        """Rows that the next forward works on: those of the step, or those in use."""
        return list(self._steps.rows)

    def step(
        self,
        tokens: int | Sequence[int],
        *,
        rows: slice | Sequence[int] | None = None,
        q_len: int | None = None,
    ) -> AbstractContextManager[None]:
        """Open a step: room for the tokens is made on the host, and the forward inside does the rest.

        Args:
            tokens: how many each row gets, or one number a row; 0 leaves a row as it is.
            rows: which rows of the cache, all by default; in the order of the forward's batch.
            q_len: columns of the forward, where they are more than the longest row has tokens.

        Raises:
            CacheFull: a row has too few slots (padding included), or the pool too few pages; nothing has
                changed.
            InvalidInput: rows that are not there, counts that do not fit them, a step inside of a step.
        """
        return self._steps.opened(tokens, rows, q_len)

    def begin(self) -> list[KVCache]:
        """The device's part of a step, for those who append without :meth:`update`; may be captured.

        Returns:
            For each layer where the step's tokens go (``cache_seqlens``) and what attention reads once they
            are there (``new_tokens`` of them count): the record of an append and of an attention alike.

        Raises:
            InvalidInput: no step is open, or a forward has begun in it.
        """
        return self._steps.begin()

    def positions(self, q_len: int) -> Tensor:
        """Where the next tokens of the rows go: their ``position_ids``, where no padding came before.

        Work of the device, to be called (or captured) before the forward of a step.

        Args:
            q_len: columns of the forward.

        Returns:
            (rows, q_len) int64.
        """
        lengths = self._steps.lengths_on_device()
        return lengths[:, None] + torch.arange(q_len, device=lengths.device)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Roll rows back to these lengths, one for each row of the cache.

        Args:
            lengths: tokens to keep, at most those that a row has.

        Raises:
            InvalidInput: another number of lengths, one that is too long, or a step that is open.
            CacheFull: a page that rows share has to be copied, and none is free.
        """
        self._steps.truncate(lengths)
