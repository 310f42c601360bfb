"""A cache where rows take pages from a common pool as they grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_decoding.cache.ledger import EVERY_ROW, Ledger, Rows, as_slice, check_sizes, upload
from flash_decoding.cache.pool import NO_PAGE, PagePool
from flash_decoding.errors import CacheFull
from flash_decoding.spec import KVCache


class PagedCache(Ledger):
    """A cache where a row owns pages of ``page_size`` slots, wherever they lie.

    Page 0 belongs to nobody. Unused entries of the block table point to it, so that a captured batch may
    append to rows without a sequence: it writes there. A page that can still be written belongs to one row
    alone; full pages may be shared (see :meth:`fork`).

    Args:
        num_pages: pages that can be handed out; one more is kept for page 0.
        page_size: slots of a page, any number from 1.
        heads_kv: key/value heads.
        head_dim: elements of a key.
        max_batch: rows, one for each sequence.
        max_pages: pages that a row can have at most, ``num_pages`` by default.
        head_dim_v: elements of a value, if not the same.
        layers: layers of a model that share lengths and block table.
        dtype: of keys and values.
        device: where all tensors lie.

    Attributes:
        keys: (layers, num_pages + 1, page_size, heads_kv, head_dim).
        values: (layers, num_pages + 1, page_size, heads_kv, head_dim_v).
        block_table: (max_batch, max_pages) int32 on the device: the page of each ``page_size`` slots.
        cache_seqlens: (max_batch,) int32 on the device: slots that are filled.
        lengths: for each row, slots that it may fill (host).

    Raises:
        InvalidInput: a size below 1.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        heads_kv: int,
        head_dim: int,
        *,
        max_batch: int,
        max_pages: int | None = None,
        head_dim_v: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes(num_pages=num_pages, page_size=page_size, max_batch=max_batch, max_pages=max_pages)
        check_sizes(heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v, layers=layers)
        width = max_pages or num_pages
        super().__init__(max_batch, width * page_size, device)
        shape = (layers, num_pages + 1, page_size, heads_kv)
        self.page_size = page_size
        self.keys = torch.empty(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.empty(*shape, head_dim_v or head_dim, dtype=dtype, device=device)
        self.block_table = torch.full((max_batch, width), NO_PAGE, dtype=torch.int32, device=device)
        self._pool = PagePool(num_pages)
        self._pages: list[list[int]] = [[] for _ in range(max_batch)]

    @property
    def k(self) -> Tensor:
        """(num_pages + 1, page_size, heads_kv, head_dim): the keys of the first layer."""
        return self.keys[0]

    @property
    def v(self) -> Tensor:
        """(num_pages + 1, page_size, heads_kv, head_dim_v): the values of the first layer."""
        return self.values[0]

    @property
    def free_pages(self) -> int:
        """Pages that no row uses."""
        return self._pool.free

    def pages(self, row: int) -> tuple[int, ...]:
        """The pages of a row, in the order of its slots.

        Args:
            row: the row to ask about.
        """
        self._check_row("row", row)
        return tuple(self._pages[row])

    def view(self, layer: int = 0, rows: Rows = EVERY_ROW) -> KVCache:
        """What a call gets to see of the cache; nothing is copied.

        Args:
            layer: which layer's keys and values.
            rows: which rows, all by default.
        """
        window = as_slice(self._choose(rows))
        table, lengths = self.block_table[window], self.cache_seqlens[window]
        return KVCache(self.keys[layer], self.values[layer], lengths, block_table=table)

    def fork(self, source: int, target: int, tokens: int | None = None) -> None:
        """Start row ``target`` with the first tokens of row ``source``: beams, samples, a common prompt.

        Full pages are shared; the one that both will go on writing is copied.

        Args:
            source: the row to start from.
            target: a row without a sequence.
            tokens: how many slots to have in common; to be given where more is allocated than filled.

        Raises:
            CacheFull: a page has to be copied and none is free.
        """
        length = self._check_fork(source, target, tokens)
        full, rest = divmod(length, self.page_size)
        if rest:
            self._check_free("tokens", 1)
        pages = self._pages[source][:full]
        self._pool.share(pages)
        if rest:
            pages.append(self._copy_of(self._pages[source][full]))
        self._pages[target] = pages
        self._write_table({target: range(len(pages))})
        self._start(target, length)

    def reorder(self, sources: Sequence[int]) -> None:
        """Let each row go on as a copy of what row ``sources[row]`` holds now: a step of beam search.

        Full pages are shared. The page that a row ends in goes to one of the rows that go on with it, and the
        others get copies.

        Args:
            sources: one row for each row of the cache; a row may be named often, or never.

        Raises:
            CacheFull: more pages have to be copied than are free; nothing has changed.
        """
        moved = self._moved(sources)
        if not moved:
            return
        pages, copied = self._shared_out(sources)
        kept = {page for held in pages for page in held}
        free = self._pool.free + len({page for held in self._pages for page in held} - kept)
        if len(copied) > free:
            raise CacheFull("sources", len(copied), free, "pages of the pool")
        for held in pages:
            self._pool.share(held)
        for held in self._pages:
            self._pool.give_back(held)
        for row, copy in zip(copied, self._copies_of(list(copied.values())), strict=True):
            pages[row].append(copy)
        changed = {row: range(max(len(self._pages[row]), len(pages[row]))) for row in moved}
        self._pages = pages
        self._write_table(changed)
        self._move_lengths(moved, sources)

    def _shared_out(self, sources: Sequence[int]) -> tuple[list[list[int]], dict[int, int]]:
        """The pages that each row takes over, and for the rows that need one the page to copy.

        A row that stays where it is keeps the page that it ends in; so nothing of it moves.
        """
        heirs = {source: row for row, source in reversed(list(enumerate(sources)))}
        heirs.update({row: row for row, source in enumerate(sources) if row == source})
        pages, copied = [], {}
        for row, source in enumerate(sources):
            full, rest = divmod(self.lengths[source], self.page_size)
            held = list(self._pages[source])
            if rest and heirs[source] != row:
                copied[row] = held[full]
                del held[full:]
            pages.append(held)
        return pages, copied

    def _grow(self, growth: dict[int, int]) -> None:
        missing = {}
        for row, tokens in growth.items():
            wanted = self._page_count(self.lengths[row] + tokens) - len(self._pages[row])
            if wanted:
                missing[row] = wanted
        self._check_free("tokens", sum(missing.values()))
        columns = {}
        for row, wanted in missing.items():
            columns[row] = range(len(self._pages[row]), len(self._pages[row]) + wanted)
            self._pages[row] += self._pool.take(wanted)
        self._write_table(columns)

    def _shrink(self, row: int, length: int) -> None:
        pages, before = self._pages[row], len(self._pages[row])
        full, rest = divmod(length, self.page_size)
        dropped = pages[self._page_count(length) :]
        # The page that the row now ends in will be written again, so it must not be shared any more.
        ends_in_shared = rest > 0 and self._pool.users(pages[full]) > 1
        if ends_in_shared and not any(self._pool.users(page) == 1 for page in dropped):
            self._check_free("length", 1)
        self._pool.give_back(dropped)
        del pages[before - len(dropped) :]
        if ends_in_shared:
            shared = pages.pop()
            pages.append(self._copy_of(shared))
            self._pool.give_back([shared])
        self._write_table({row: range(full if ends_in_shared else len(pages), before)})

    def _page_count(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _check_free(self, argument: str, wanted: int) -> None:
        if wanted > self._pool.free:
            raise CacheFull(argument, wanted, self._pool.free, "pages of the pool")

    def _copy_of(self, page: int) -> int:
        """A page of its own with the same contents, in every layer."""
        (copy,) = self._pool.take(1)
        for storage in (self.keys, self.values):
            storage[:, copy] = storage[:, page]
        return copy

    def _copies_of(self, pages: list[int]) -> list[int]:
        """The same for many pages at once."""
        copies = self._pool.take(len(pages))
        if copies:
            new, old = (upload(numbers, self.keys.device) for numbers in (copies, pages))
            for storage in (self.keys, self.values):
                storage[:, new] = storage[:, old]
        return copies

    def _write_table(self, columns: dict[int, range]) -> None:
        """Bring these columns of these rows up to date on the device, all in one small copy."""
        entries = [
            (row, column, self._pages[row][column] if column < len(self._pages[row]) else NO_PAGE)
            for row, changed in columns.items()
            for column in changed
        ]
        if entries:
            row, column, page = upload(entries, self.block_table.device).unbind(dim=1)
            self.block_table[row, column] = page.to(torch.int32)
