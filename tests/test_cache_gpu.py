"""Caches on a GPU: bookkeeping that never waits for it, and steps that a CUDA graph repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flash_decoding import ContiguousCache, PagedCache, append_kv, decode_attention
from flash_decoding.spec import Options, Queries
from tests.helpers import assert_close_to_reference

pytestmark = pytest.mark.gpu

ROWS, HEADS_Q, HEADS_KV, HEAD_DIM = 3, 4, 2, 64
Cache = ContiguousCache | PagedCache


def contiguous() -> ContiguousCache:
    return ContiguousCache(ROWS, 96, HEADS_KV, HEAD_DIM, device="cuda")


def paged() -> PagedCache:
    return PagedCache(20, 6, HEADS_KV, HEAD_DIM, max_batch=ROWS, max_pages=16, device="cuda")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Turn every wait of the host for the device into an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make", [contiguous, paged])
def test_bookkeeping_never_waits_for_the_device(make: Callable[[], Cache]) -> None:
    cache = make()
    cache.allocate([20, 7, 0])
    cache.advance()
    cache.advance(torch.ones(ROWS, dtype=torch.int32, device="cuda"))
    cache.fork(0, 2, tokens=15)
    cache.truncate(0, 3)
    cache.free(1)
    cache.reorder([2, 1, 0])
    assert cache.live_rows == [0, 2]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("make", [contiguous, paged])
def test_one_captured_step_serves_requests_that_come_grow_and_go(make: Callable[[], Cache]) -> None:
    cache = make()
    q, k, v = random(ROWS, 1, HEADS_Q), random(ROWS, 1, HEADS_KV), random(ROWS, 1, HEADS_KV)

    def step() -> Tensor:
        cache.advance()
        append_kv(k, v, **cache.writing())
        out = decode_attention(q, **cache.reading())
        assert isinstance(out, Tensor)
        return out

    step()  # compiles; no row is live yet, so nothing counts
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    options = Options.make(head_dim=HEAD_DIM, causal=True)
    written: list[list[Tensor]] = [[], [], []]
    for rows in ([1], [0, 1], [0, 1], [0, 1, 2], *[[0, 2]] * 30, [1, 2]):
        for row in set(cache.live_rows) - set(rows):
            cache.free(row)
            written[row] = []
        cache.allocate([int(row in rows) for row in range(ROWS)])
        for tensor in (q, k, v):
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        for row in rows:
            written[row].append(k[row, 0].clone())
        assert cache.cache_seqlens.tolist() == [len(keys) for keys in written] == cache.lengths
        assert_close_to_reference(out, None, Queries(q), cache.view(), options)
    for row in cache.live_rows:
        assert torch.equal(keys_of(cache, row), torch.stack(written[row]))


def keys_of(cache: Cache, row: int) -> Tensor:
    length = cache.lengths[row]
    if isinstance(cache, ContiguousCache):
        return cache.k[row, :length]
    return cache.k[list(cache.pages(row))].flatten(0, 1)[:length]
