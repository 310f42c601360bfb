"""Pages: handed out, shared, copied before they would be written twice, and given back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from flash_decoding.cache import PagedCache
from flash_decoding.errors import CacheFull
from tests.cache_tools import append, paged, read


def test_more_pages_than_the_pool_has_are_refused_before_anything_changes() -> None:
    cache = paged()
    append(cache, 0, [1] * 12)
    table = cache.block_table.clone()
    with pytest.raises(CacheFull, match=r"3 pages of the pool; wanted at most 2") as caught:
        cache.allocate([0, 4, 1])
    assert caught.value.free == cache.free_pages == 2
    assert cache.lengths == [12, 0, 0]
    assert torch.equal(cache.block_table, table)


def test_fork_shares_full_pages_and_copies_the_last() -> None:
    cache = paged()
    append(cache, 0, [1, 2, 3, 4])
    cache.fork(0, 1)
    first, second = cache.pages(0), cache.pages(1)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert cache.free_pages == 3
    append(cache, 0, [5])
    append(cache, 1, [6])
    assert (read(cache, 0), read(cache, 1)) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6])


def test_fork_without_a_page_for_the_copy_is_refused() -> None:
    cache = paged(num_pages=2)
    append(cache, 0, [1, 2, 3, 4])
    with pytest.raises(CacheFull, match="pages of the pool"):
        cache.fork(0, 1)
    assert cache.live_rows == [0]
    cache.fork(0, 1, tokens=3)
    assert read(cache, 1) == [1, 2, 3]


def test_truncating_into_a_shared_page_makes_it_private() -> None:
    cache = paged()
    append(cache, 0, [1, 2, 3])
    cache.fork(0, 1)
    cache.truncate(0, 1)
    append(cache, 0, [8, 9])
    assert (read(cache, 0), read(cache, 1)) == ([1, 8, 9], [1, 2, 3])


def test_truncating_into_a_shared_page_may_reuse_the_pages_it_drops() -> None:
    cache = paged(num_pages=2)
    append(cache, 0, [1, 2, 3])
    cache.fork(0, 1)
    with pytest.raises(CacheFull, match="length"):
        cache_without_free_pages(cache).truncate(1, 1)
    cache.truncate(0, 2)
    assert (read(cache, 0), read(cache, 1)) == ([1, 2], [1, 2, 3])


def cache_without_free_pages(cache: PagedCache) -> PagedCache:
    append(cache, 0, [4] * (cache.free_pages * cache.page_size))
    return cache


def test_unused_entries_of_the_table_point_to_the_page_of_nobody() -> None:
    cache = paged()
    append(cache, 0, [1, 2, 3, 4])
    assert cache.block_table.tolist() == [[1, 2, 0, 0], [0] * 4, [0] * 4]
    cache.truncate(0, 3)
    assert cache.block_table.tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4]
    cache.free(0)
    assert cache.block_table.tolist() == [[0] * 4] * 3


def test_reorder_shares_full_pages_and_copies_the_last() -> None:
    cache = paged(num_pages=6, page_size=3)
    append(cache, 0, [1, 2, 3, 4])
    append(cache, 1, [5, 6, 7, 8])
    before = cache.pages(0)
    cache.reorder([0, 0, 0])
    assert cache.pages(0) == before
    assert [cache.pages(row)[0] for row in (1, 2)] == [before[0]] * 2
    assert len({cache.pages(row)[1] for row in range(3)}) == 3
    assert cache.free_pages == 2
    cache.free()
    assert cache.free_pages == 6


def test_reorder_that_needs_more_copies_than_pages_changes_nothing() -> None:
    cache = paged(num_pages=2, page_size=3)
    append(cache, 0, [1])
    with pytest.raises(CacheFull, match="sources: got 2 pages of the pool; wanted at most 1"):
        cache.reorder([0, 0, 0])
    assert (cache.lengths, cache.free_pages, cache.live_rows) == ([1, 0, 0], 1, [0])
    cache.reorder([0, 0, 2])
    assert [read(cache, row) for row in range(3)] == [[1], [1], []]


def test_beams_never_need_more_pages_than_they_had() -> None:
    cache = paged(num_pages=6, page_size=3)
    for row in range(3):
        append(cache, row, [row, row, row, row])
    assert cache.free_pages == 0
    cache.reorder([2, 2, 1])
    assert [read(cache, row) for row in range(3)] == [[2] * 4, [2] * 4, [1] * 4]


class Model(RuleBasedStateMachine):
    """Random steps on a paged cache and on lists of tokens side by side."""

    @initialize(page_size=st.sampled_from([1, 3, 4]))
    def start(self, page_size: int) -> None:
        self.cache = paged(num_pages=7, page_size=page_size)
        self.rows: list[list[int] | None] = [None] * 3
        self.next_token = 1

    @rule(row=st.integers(0, 2), count=st.integers(1, 6))
    def append(self, row: int, count: int) -> None:
        tokens = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        try:
            append(self.cache, row, tokens)
        except CacheFull:
            return  # the invariants see to it that nothing has changed
        self.rows[row] = (self.rows[row] or []) + tokens

    @rule(source=st.integers(0, 2), other=st.integers(0, 2), cut=st.integers(0, 5))
    def fork(self, source: int, other: int, cut: int) -> None:
        held = self.rows[source]
        if held is None or self.rows[other] is not None:
            return
        tokens = max(len(held) - cut, 0)
        try:
            self.cache.fork(source, other, tokens)
        except CacheFull:
            return
        self.rows[other] = held[:tokens]

    @rule(row=st.integers(0, 2), cut=st.integers(0, 5))
    def truncate(self, row: int, cut: int) -> None:
        held = self.rows[row]
        if held is None:
            return
        length = max(len(held) - cut, 0)
        try:
            self.cache.truncate(row, length)
        except CacheFull:
            return
        self.rows[row] = held[:length]

    @rule(sources=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, sources: list[int]) -> None:
        try:
            self.cache.reorder(sources)
        except CacheFull:
            return
        held = [self.rows[source] for source in sources]
        self.rows = [None if tokens is None else list(tokens) for tokens in held]

    @rule(row=st.integers(0, 2))
    def free(self, row: int) -> None:
        self.cache.free(row)
        self.rows[row] = None

    @invariant()
    def rows_hold_what_they_should(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert [read(self.cache, row) for row in range(3)] == [held or [] for held in self.rows]
        assert self.cache.lengths == self.cache.cache_seqlens.tolist()
        assert self.cache.live_rows == [row for row, held in enumerate(self.rows) if held is not None]

    @invariant()
    def every_page_is_free_or_used_and_writable_ones_are_private(self) -> None:
        if not hasattr(self, "cache"):
            return
        rows = [self.cache.pages(row) for row in range(3)]
        used = [page for pages in rows for page in pages]
        assert 0 not in used
        assert len(set(used)) + self.cache.free_pages == 7
        for row, pages in enumerate(rows):
            assert self.cache.block_table[row].tolist() == [*pages, *[0] * (4 - len(pages))]
            full = self.cache.lengths[row] // self.cache.page_size
            assert all(used.count(page) == 1 for page in pages[full:])


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=40, stateful_step_count=25)
