"""What only a GPU can show: graphs over growing lengths, compile counts, addresses beyond 2**31 elements."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import execute
from flash_decoding.spec import KVCache, Options, Queries
from tests.helpers import Case, assert_close_to_reference, make_inputs

pytestmark = pytest.mark.gpu

HEADS, HEADS_KV, DIM = 16, 2, 64


def step(cache: dict[str, Tensor], new: dict[str, Tensor], table: Tensor | None) -> tuple[Tensor, Tensor]:
    """One decode step as an engine has it: append with rotary, attend, advance the lengths."""
    lengths = cache["seqlens"]
    q = fd.append_kv(
        new["k"],
        new["v"],
        cache["k"],
        cache["v"],
        q=new["q"],
        rotary_cos=new["cos"],
        rotary_sin=new["sin"],
        cache_seqlens=lengths,
        block_table=table,
    )
    assert q is not None
    lengths.add_(1)
    out, lse = fd.decode_attention(
        q, cache["k"], cache["v"], cache_seqlens=lengths, block_table=table, return_lse=True
    )
    return out, lse


def step_inputs(
    batch: int, capacity: int, page_size: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None]:
    """A cache full of NaN, a step's tokens, and a shuffled block table."""

    def randn(heads: int) -> Tensor:
        return torch.randn(batch, 1, heads, DIM, dtype=torch.float16, device="cuda")

    pages = batch * capacity // page_size if page_size else batch
    shape = (pages, page_size or capacity, HEADS_KV, DIM)
    cache = {name: torch.full(shape, float("nan"), dtype=torch.float16, device="cuda") for name in "kv"}
    cache["seqlens"] = torch.zeros(batch, dtype=torch.int32, device="cuda")
    angles = torch.rand(capacity, DIM // 2, device="cuda")
    new = {
        "q": randn(HEADS),
        "k": randn(HEADS_KV),
        "v": randn(HEADS_KV),
        "cos": angles.cos().half(),
        "sin": angles.sin().half(),
    }
    table = None
    if page_size:
        table = torch.randperm(pages, device="cuda").int().reshape(batch, -1)
    return cache, new, table


@pytest.mark.parametrize("page_size", [0, 16])
def test_one_graph_is_right_for_every_length(page_size: int) -> None:
    """Captured once as the very first call at length 0, replayed until the cache is full."""
    capacity = 512
    cache, new, table = step_inputs(3, capacity, page_size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step(cache, new, table)
    q = torch.empty_like(new["q"])
    for length in range(1, capacity + 1):
        for name in ("q", "k", "v"):
            new[name].normal_()
        graph.replay()
        if length > 70 and length % 61 and length != capacity:
            continue
        assert cache["seqlens"].tolist() == [length] * 3
        q = rotated_by_hand(new["q"], new["cos"][length - 1], new["sin"][length - 1])
        live = KVCache(cache["k"], cache["v"], cache["seqlens"], table)
        assert_close_to_reference(out, lse, Queries(q), live, Options.make(head_dim=DIM))


def rotated_by_hand(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves at one position, in fp32, rounded once."""
    first, second = q.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(q.dtype)


def kernels_compiled() -> int:
    from flash_decoding.kernels import append, attend, combine

    kernels = (attend.attend_kernel, combine.combine_kernel, append.append_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("page_size", [0, 16])
def test_a_decode_loop_compiles_once(page_size: int) -> None:
    """From 1 token to capacity: the first step compiles, no other does."""
    cache, new, table = step_inputs(2, 160, page_size)
    step(cache, new, table)
    compiled = kernels_compiled()
    for _ in range(159):
        step(cache, new, table)
    assert cache["seqlens"].tolist() == [160, 160]
    assert kernels_compiled() == compiled


def test_batch_capacity_and_splits_do_not_compile() -> None:
    """Other batches, capacities, lengths and split counts run what is there already."""
    fd.warmup(heads_q=HEADS, heads_kv=HEADS_KV, head_dim=DIM, dtype=torch.float16)
    compiled = kernels_compiled()
    for batch, capacity, num_splits in (
        (1, 1000, 0),
        (3, 77, 0),
        (300, 64, 0),
        (2, 4096, 7),
        (5, 333, 3),
        (1, 16, 1),
    ):
        q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(batch, capacity, HEADS_KV, DIM, device="cuda", dtype=torch.float16) for _ in "kv")
        fd.decode_attention(q, k, v, cache_seqlens=capacity // 2, num_splits=num_splits)
        fd.append_kv(k[:, :1], v[:, :1], k, v, cache_seqlens=capacity // 2)
    assert kernels_compiled() == compiled


@pytest.mark.lazy_memory
def test_contiguous_offsets_beyond_2_to_the_31() -> None:
    """Two sequences whose rows lie 2**31 elements apart, with tokens 2**20 elements apart."""
    tokens, stride = 40, 2**20
    size = 2**31 + tokens * stride
    storages = [torch.empty(size, dtype=torch.float16, device="cuda") for _ in "kv"]
    k, v = (x.as_strided((2, tokens, 2, 64), (2**31, stride, 64, 1)) for x in storages)
    check_far_cache(KVCache(k, v, torch.tensor([40, 33], dtype=torch.int32, device="cuda")))


@pytest.mark.lazy_memory
@pytest.mark.parametrize("page_size", [16, 128])
def test_paged_offsets_beyond_2_to_the_31(page_size: int) -> None:
    """A pool of more than 2**31 elements, read and written through its last pages."""
    pages = 2**31 // (page_size * 2 * 64) + 8
    shape = (pages, page_size, 2, 64)
    k, v = (torch.empty(shape, dtype=torch.float16, device="cuda") for _ in "kv")
    table = torch.tensor([[pages - 1, pages - 2], [pages - 3, 1]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([2 * page_size - 3, page_size + 1], dtype=torch.int32, device="cuda")
    check_far_cache(KVCache(k, v, lengths, table))


def check_far_cache(cache: KVCache) -> None:
    """Fill the live slots through the append, then attend."""
    longest = int(cache.cache_seqlens.max())
    k, v = (torch.randn(2, longest, 2, 64, device="cuda", dtype=torch.float16) for _ in "kv")
    fd.append_kv(k, v, cache.k, cache.v, cache_seqlens=0, block_table=cache.block_table)
    queries = Queries(torch.randn(2, 1, 8, 64, device="cuda", dtype=torch.float16))
    options = Options.make(head_dim=64)
    out, lse = execute.attention(queries, cache, options, num_splits=2)
    assert_close_to_reference(out, lse, queries, cache, options)
    near = KVCache(k, v, cache.cache_seqlens)
    assert_close_to_reference(out, lse, queries, near, options)


def test_many_sequences_and_a_long_one() -> None:
    lengths = (20000, *([0, 1, 17] * 20))
    case = Case(
        batch=61, capacity=20000, page_size=16, seqlens=lengths, heads_q=8, heads_kv=1, dtype=torch.bfloat16
    )
    inputs = make_inputs(case, device="cuda")
    out, lse = execute.attention(*inputs)
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("q_len", [256, 1000])
def test_dense_prefill_through_sdpa(q_len: int) -> None:
    q = torch.randn(2, q_len, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, q_len, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    out = fd.decode_attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    full = KVCache(k, v, torch.full((2,), q_len, dtype=torch.int32, device="cuda"))
    assert_close_to_reference(out, None, Queries(q), full, Options.make(head_dim=128, causal=True))


def test_long_chunked_prefill_over_pages() -> None:
    """A chunk of 300 tokens against 1000 cached ones, in pages of 16: our kernel, many row tiles, causal."""
    case = Case(q_len=300, heads_q=8, heads_kv=2, head_dim=128, capacity=1300, page_size=16, causal=True)
    for dtype in (torch.bfloat16, torch.float32):
        inputs = make_inputs(Case(**{**case.__dict__, "dtype": dtype}), device="cuda")
        out, lse = execute.attention(*inputs)
        assert_close_to_reference(out, lse, *inputs)
