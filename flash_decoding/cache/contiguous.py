"""A cache where every row has its slots to itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_decoding.cache.ledger import EVERY_ROW, Ledger, Rows, as_slice, check_sizes, upload
from flash_decoding.spec import KVCache


class ContiguousCache(Ledger):
    """A cache where every row owns ``capacity`` slots, one behind the other.

    Args:
        batch: rows, one for each sequence.
        capacity: slots of a row.
        heads_kv: key/value heads.
        head_dim: elements of a key.
        head_dim_v: elements of a value, if not the same.
        layers: layers of a model that share the lengths.
        dtype: of keys and values.
        device: where all tensors lie.

    Attributes:
        keys: (layers, batch, capacity, heads_kv, head_dim).
        values: (layers, batch, capacity, heads_kv, head_dim_v).
        cache_seqlens: (batch,) int32 on the device: slots that are filled.
        lengths: for each row, slots that it may fill (host).

    Raises:
        InvalidInput: a size below 1.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads_kv: int,
        head_dim: int,
        *,
        head_dim_v: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes(batch=batch, capacity=capacity, heads_kv=heads_kv, layers=layers)
        check_sizes(head_dim=head_dim, head_dim_v=head_dim_v)
        super().__init__(batch, capacity, device)
        shape = (layers, batch, capacity, heads_kv)
        self.keys = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.empty(*shape, head_dim_v or head_dim, dtype=dtype, device=device)

    @property
    def k(self) -> Tensor:
        """(batch, capacity, heads_kv, head_dim): the keys of the first layer."""
        return self.keys[0]

    @property
    def v(self) -> Tensor:
        """(batch, capacity, heads_kv, head_dim_v): the values of the first layer."""
        return self.values[0]

    def view(self, layer: int = 0, rows: Rows = EVERY_ROW) -> KVCache:
        """What a call gets to see of the cache; nothing is copied.

        Args:
            layer: which layer's keys and values.
            rows: which rows, all by default.
        """
        window = as_slice(self._choose(rows))
        return KVCache(self.keys[layer, window], self.values[layer, window], self.cache_seqlens[window])

    def fork(self, source: int, target: int, tokens: int | None = None) -> None:
        """Start row ``target`` as a copy of the first tokens of row ``source``.

        Args:
            source: the row to copy from.
            target: a row without a sequence.
            tokens: how many slots to copy; to be given where more is allocated than filled.
        """
        length = self._check_fork(source, target, tokens)
        for storage in (self.keys, self.values):
            storage[:, target, :length] = storage[:, source, :length]
        self._start(target, length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each row go on as a copy of what row ``sources[row]`` holds now: a step of beam search.

        Only rows that change are copied.

        Args:
            sources: one row for each row of the cache; a row may be named often, or never.
        """
        moved = self._moved(sources)
        if not moved:
            return
        length = max(self.lengths[sources[row]] for row in moved)
        new = upload(moved, self.keys.device)
        old = upload([sources[row] for row in moved], self.keys.device)
        for storage in (self.keys[:, :, :length], self.values[:, :, :length]):
            storage[:, new] = storage[:, old]
        self._move_lengths(moved, sources)

    def _grow(self, growth: dict[int, int]) -> None:
        """Every row has all its slots from the start."""

    def _shrink(self, row: int, length: int) -> None:
        """Nothing to give back."""
