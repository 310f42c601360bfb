"""What both caches do: room, lengths on both sides, layers, views, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flash_decoding.cache import PagedCache
from flash_decoding.errors import CacheFull, InvalidInput
from tests.cache_tools import BOTH, Cache, append, contiguous, paged, read, slots_of, write


@pytest.mark.parametrize("make", BOTH)
def test_a_new_cache_is_empty_and_shaped_as_documented(make: Callable[[], Cache]) -> None:
    cache = make()
    assert cache.lengths == [0, 0, 0]
    assert cache.cache_seqlens.tolist() == [0, 0, 0]
    assert cache.cache_seqlens.dtype == torch.int32
    assert cache.live_rows == []
    assert cache.capacity == 12
    seen = cache.view()
    assert (seen.capacity, seen.heads) == (12, 1)
    assert seen.k.shape[1:] == cache.k.shape[1:]
    assert (cache.k.shape[-1], cache.v.shape[-1]) == (2, 1)


@pytest.mark.parametrize("make", BOTH)
def test_tokens_come_back_in_order(make: Callable[[], Cache]) -> None:
    cache = make()
    append(cache, 0, [10, 11, 12, 13])
    append(cache, 2, [30])
    append(cache, 0, [14])
    assert [read(cache, row) for row in range(3)] == [[10, 11, 12, 13, 14], [], [30]]
    assert cache.lengths == [5, 0, 1]
    assert cache.live_rows == [0, 2]


@pytest.mark.parametrize("make", [contiguous, paged])
def test_layers_share_lengths_and_pages(make: Callable[..., Cache]) -> None:
    cache = make(layers=3)
    append(cache, 1, [5, 6, 7, 8])
    cache.fork(1, 0, tokens=4)
    for layer in range(3):
        assert read(cache, 0, layer) == read(cache, 1, layer) == [5, 6, 7, 8]


@pytest.mark.parametrize("make", BOTH)
def test_a_view_of_some_rows_shares_memory(make: Callable[[], Cache]) -> None:
    cache = make()
    append(cache, 1, [1, 2])
    seen = cache.view(rows=1)
    assert slots_of(seen, 0)[0][:, 0, 0].tolist() == [1, 2]
    assert seen.cache_seqlens.data_ptr() == cache.cache_seqlens[1:].data_ptr()
    assert seen.k.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("make", BOTH)
def test_addresses_never_change(make: Callable[[], Cache]) -> None:
    cache = make()

    def addresses() -> list[int]:
        tensors = [cache.keys, cache.values, *cache.reading().values(), *cache.writing().values()]
        return [tensor.data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)]

    before = addresses()
    append(cache, 0, [1, 2, 3, 4])
    cache.fork(0, 1)
    cache.truncate(0, 2)
    cache.free(1)
    append(cache, 1, [1])
    assert addresses() == before


@pytest.mark.parametrize("make", BOTH)
def test_room_ahead_then_many_advances(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate(6)
    for token in range(6):
        for row in range(3):
            write(cache, row, [token + row])
    assert [read(cache, row) for row in range(3)] == [list(range(row, row + 6)) for row in range(3)]


@pytest.mark.parametrize("make", BOTH)
def test_truncating_room_that_is_not_filled_yet_counts_no_tokens(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate(6)
    write(cache, 0, [1, 2])
    cache.truncate(0, 4)
    assert (cache.lengths[0], read(cache, 0)) == (4, [1, 2])


@pytest.mark.parametrize("make", BOTH)
def test_a_step_writes_where_it_started_and_reads_to_where_it_ended(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate(4)
    cache.advance(3)
    cache.advance(1, slice(1, 3))
    assert cache.writing()["cache_seqlens"].tolist() == [0, 3, 3]
    assert cache.reading()["cache_seqlens"].tolist() == [3, 4, 4]
    assert cache.writing(rows=2)["cache_seqlens"].tolist() == [3]


@pytest.mark.parametrize("make", BOTH)
def test_rows_may_advance_by_different_counts(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate([3, 0, 2])
    cache.advance(torch.tensor([3, 9, 1], dtype=torch.int32))
    assert cache.cache_seqlens.tolist() == [3, 0, 1]


@pytest.mark.parametrize("make", BOTH)
def test_rows_without_a_sequence_do_not_advance(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate(1, slice(0, 2))
    cache.advance()
    cache.free(1)
    cache.advance()
    assert cache.cache_seqlens.tolist() == [2, 0, 0]


@pytest.mark.parametrize("make", BOTH)
def test_a_row_can_be_used_again(make: Callable[[], Cache]) -> None:
    cache = make()
    append(cache, 1, list(range(12)))
    cache.free(1)
    append(cache, 1, [7])
    assert read(cache, 1) == [7]
    cache.free()
    assert cache.live_rows == []


@pytest.mark.parametrize("make", BOTH)
def test_more_than_the_capacity_is_refused_before_anything_changes(make: Callable[[], Cache]) -> None:
    cache = make()
    append(cache, 1, [1] * 5)
    with pytest.raises(CacheFull, match=r"tokens: got 8 slots of row 1; wanted at most 7") as caught:
        cache.allocate([1, 8, 1])
    assert caught.value.free == 7
    assert cache.lengths == [0, 5, 0]
    assert cache.live_rows == [1]


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda cache: cache.allocate(-1), "tokens"),
        (lambda cache: cache.allocate([1, 2]), "tokens"),
        (lambda cache: cache.allocate(1, 3), "rows"),
        (lambda cache: cache.allocate(1, -1), "rows"),
        (lambda cache: cache.allocate(1, slice(0, 3, 2)), "rows"),
        (lambda cache: cache.truncate(0, 3), "length"),
        (lambda cache: cache.truncate(0, -1), "length"),
        (lambda cache: cache.truncate(5, 0), "row"),
        (lambda cache: cache.fork(0, 0), "target"),
        (lambda cache: cache.fork(7, 1), "source"),
        (lambda cache: cache.fork(0, 1, tokens=3), "tokens"),
    ],
)
def test_bad_arguments_are_named(
    make: Callable[[], Cache], call: Callable[[Cache], None], argument: str
) -> None:
    cache = make()
    append(cache, 0, [1, 2])
    with pytest.raises(InvalidInput) as caught:
        call(cache)
    assert caught.value.argument == argument
    assert (cache.lengths, cache.live_rows, cache.cache_seqlens.tolist()) == ([2, 0, 0], [0], [2, 0, 0])


@pytest.mark.parametrize("name", ["num_pages", "page_size", "max_batch", "max_pages", "head_dim_v", "layers"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"num_pages": 2, "page_size": 2, "heads_kv": 1, "head_dim": 2, "max_batch": 1, name: 0}
    with pytest.raises(InvalidInput, match=name):
        PagedCache(**sizes)  # type: ignore[arg-type]  # only sizes are passed


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("sources", [[0, 1], [0, 1, 3], [0, -1, 2]])
def test_reorder_refuses_rows_that_are_not_there(make: Callable[[], Cache], sources: list[int]) -> None:
    with pytest.raises(InvalidInput, match="sources"):
        make().reorder(sources)


@pytest.mark.parametrize("make", [contiguous, paged])
@pytest.mark.parametrize("sources", [[0, 1, 2], [2, 2, 0], [1, 1, 1], [1, 2, 0]])
def test_reorder_gives_each_row_its_source(make: Callable[..., Cache], sources: list[int]) -> None:
    cache = make(layers=2)
    rows = [[1, 2], [], [3, 4, 5, 6]]
    for row, tokens in enumerate(rows):
        append(cache, row, tokens)
    cache.reorder(sources)
    for layer in range(2):
        assert [read(cache, row, layer) for row in range(3)] == [rows[source] for source in sources]
    for row in range(3):
        append(cache, row, [9 + row])
    assert [read(cache, row) for row in range(3)] == [
        [*rows[source], 9 + row] for row, source in enumerate(sources)
    ]
