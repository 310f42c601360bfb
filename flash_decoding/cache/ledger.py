"""The rows of a cache: how many slots each may fill (host), and how many it has filled (device)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypedDict

import torch
from torch import Tensor

from flash_decoding.errors import CacheFull, InvalidInput
from flash_decoding.spec import KVCache

Rows: TypeAlias = int | slice
"""One row of a cache, or neighbouring ones."""

EVERY_ROW = slice(None)


class CacheArguments(TypedDict):
    """A cache under the argument names of the public functions."""

    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None


class Ledger(ABC):
    """Bookkeeping that both caches share; they differ in what stands behind a slot.

    Attributes:
        batch: rows of the cache.
        capacity: slots that a row can have at most.
        lengths: for each row, slots that it may fill (host).
        cache_seqlens: (batch,) int32 on the device: slots that are filled.
        starts: (batch,) int32 on the device: what ``cache_seqlens`` was before the last :meth:`advance`, so
            the slot that the first token of this step goes to.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device | str | None) -> None:
        self.batch, self.capacity = batch, capacity
        self.lengths = [0] * batch
        self.cache_seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.starts = torch.zeros_like(self.cache_seqlens)
        self._live = [False] * batch
        self._live_on_device = torch.zeros_like(self.cache_seqlens)

    @property
    def live_rows(self) -> list[int]:
        """The rows that hold a sequence, in order."""
        return [row for row, live in enumerate(self._live) if live]

    @abstractmethod
    def view(self, layer: int = 0, rows: Rows = EVERY_ROW) -> KVCache:
        """What a call gets to see of the cache; nothing is copied.

        Args:
            layer: which layer's keys and values.
            rows: which rows, all by default.
        """

    def reading(self, layer: int = 0, rows: Rows = EVERY_ROW) -> CacheArguments:
        """The cache as arguments of an attention: ``decode_attention(q, **cache.reading())``.

        Args:
            layer: which layer's keys and values.
            rows: the rows that q belongs to, all by default.
        """
        seen = self.view(layer, rows)
        return {
            "k_cache": seen.k,
            "v_cache": seen.v,
            "cache_seqlens": seen.cache_seqlens,
            "block_table": seen.block_table,
        }

    def writing(self, layer: int = 0, rows: Rows = EVERY_ROW) -> CacheArguments:
        """The cache as arguments of an append: ``append_kv(k, v, **cache.writing())``.

        Tokens go where the last :meth:`advance` of these rows made them count.

        Args:
            layer: which layer's keys and values.
            rows: the rows that k and v belong to, all by default.
        """
        return {**self.reading(layer, rows), "cache_seqlens": self.starts[as_slice(self._choose(rows))]}

    def allocate(self, tokens: int | Sequence[int], rows: Rows = EVERY_ROW) -> None:
        """Make room for more tokens: for all of them, or an error and nothing has changed.

        Args:
            tokens: how many more for each of the rows, or one number a row; 0 leaves a row as it is.
            rows: the rows that grow. A row without a sequence starts one.

        Raises:
            CacheFull: there are not enough slots, or not enough pages.
        """
        chosen = self._choose(rows)
        counts = [tokens] * len(chosen) if isinstance(tokens, int) else list(tokens)
        if len(counts) != len(chosen) or any(count < 0 for count in counts):
            raise InvalidInput("tokens", tokens, f"a number >= 0, or {len(chosen)} of them: one a row")
        growth = {row: count for row, count in zip(chosen, counts, strict=True) if count > 0}
        for row, count in growth.items():
            free = self.capacity - self.lengths[row]
            if count > free:
                raise CacheFull("tokens", count, free, f"slots of row {row}")
        self._grow(growth)
        for row, count in growth.items():
            self.lengths[row] += count
        self._set_live([row in growth or live for row, live in enumerate(self._live)])

    def advance(self, tokens: int | Tensor = 1, rows: Rows = EVERY_ROW) -> None:
        """Begin a step of so many tokens: they count from now on, and :meth:`writing` says where they go.

        Works on the device alone, so it may be captured. It cannot ask the host, so what it counts must have
        been allocated. A row without a sequence stays at 0.

        Args:
            tokens: how many in each of the rows; where they differ, a tensor (rows,) int32 on the device.
            rows: the rows that are appended to.
        """
        chosen = as_slice(self._choose(rows))
        lengths, live = self.cache_seqlens[chosen], self._live_on_device[chosen]
        self.starts[chosen].copy_(lengths)
        if isinstance(tokens, int):
            lengths.add_(live, alpha=tokens)
        else:
            lengths.addcmul_(live, tokens)

    def truncate(self, row: int, length: int) -> None:
        """Forget what a row holds behind its first ``length`` slots, such as rejected draft tokens.

        Args:
            row: the row to shorten.
            length: slots to keep, and from now on all that the row may fill.

        Raises:
            CacheFull: the page that it ends in is shared, and no page is free for a copy of it.
        """
        self._check_length("length", row, length)
        self._shrink(row, length)
        self.lengths[row] = length
        self.cache_seqlens[row : row + 1].clamp_(max=length)

    def free(self, rows: Rows = EVERY_ROW) -> None:
        """End the sequences of these rows: what they held can be overwritten from now on.

        Work that was queued before on the same stream still finds it.

        Args:
            rows: the rows to empty, all by default.
        """
        chosen = self._choose(rows)
        for row in chosen:
            self._shrink(row, 0)
            self.lengths[row] = 0
        self._set_live([live and row not in chosen for row, live in enumerate(self._live)])
        self.cache_seqlens[as_slice(chosen)].zero_()

    @abstractmethod
    def _grow(self, growth: dict[int, int]) -> None:
        """Take what the rows need for so many more tokens each, or raise before anything changes."""

    @abstractmethod
    def _shrink(self, row: int, length: int) -> None:
        """Give back what a row does not need for its first ``length`` slots."""

    def _start(self, row: int, length: int) -> None:
        """Let an idle row hold a sequence of ``length`` filled slots."""
        self.lengths[row] = length
        self._set_live([live or other == row for other, live in enumerate(self._live)])
        self.cache_seqlens[row : row + 1].fill_(length)

    def _moved(self, sources: Sequence[int]) -> list[int]:
        """The rows that a reordering changes."""
        if len(sources) != self.batch:
            raise InvalidInput("sources", sources, f"{self.batch} rows, one for each row of the cache")
        for source in sources:
            self._check_row("sources", source)
        return [row for row, source in enumerate(sources) if source != row]

    def _move_lengths(self, moved: list[int], sources: Sequence[int]) -> None:
        """Let the rows that a reordering changes have the lengths of their sources."""
        device = self.cache_seqlens.device
        old = upload([sources[row] for row in moved], device)
        self.cache_seqlens[upload(moved, device)] = self.cache_seqlens[old]
        self.lengths = [self.lengths[source] for source in sources]
        self._set_live([self._live[source] for source in sources])

    def _set_live(self, live: list[bool]) -> None:
        if live != self._live:
            self._live = live
            self._live_on_device.copy_(upload(live, self.cache_seqlens.device))

    def _choose(self, rows: Rows) -> range:
        if isinstance(rows, int):
            self._check_row("rows", rows)
            return range(rows, rows + 1)
        chosen = range(self.batch)[rows]
        if chosen.step != 1:
            raise InvalidInput("rows", rows, "neighbouring rows: a slice without a step")
        return chosen

    def _check_row(self, argument: str, row: int) -> None:
        if not 0 <= row < self.batch:
            raise InvalidInput(argument, row, f"a row from 0 to {self.batch - 1}")

    def _check_length(self, argument: str, row: int, length: int) -> None:
        self._check_row("row", row)
        if not 0 <= length <= self.lengths[row]:
            raise InvalidInput(argument, length, f"0 to {self.lengths[row]}, all that row {row} may fill")

    def _check_fork(self, source: int, target: int, tokens: int | None) -> int:
        """The number of slots that the rows will have in common."""
        self._check_row("source", source)
        self._check_row("target", target)
        if self._live[target]:
            raise InvalidInput("target", target, "a row without a sequence (free it first)")
        length = self.lengths[source] if tokens is None else tokens
        self._check_length("tokens", source, length)
        return length


def as_slice(rows: range) -> slice:
    """The same rows, to index a tensor with: a slice of it shares its memory."""
    return slice(rows.start, rows.stop)


def upload(values: Iterable[object], device: torch.device) -> Tensor:
    """A small host list as a tensor of the device, without waiting for it."""
    # From pageable memory the driver may wait for the stream; from pinned memory the copy is queued.
    return torch.tensor(list(values), pin_memory=device.type == "cuda").to(device, non_blocking=True)


def check_sizes(**sizes: int | None) -> None:
    """Raise InvalidInput for a size below 1; None stands for a default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise InvalidInput(name, size, "1 or more")
