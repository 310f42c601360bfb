"""What the tests of the contracts look through: every way to a result, other memory layouts, allocations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flash_decoding as fd
from flash_decoding.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_decoding.spec import KVCache
from tests.helpers import Case, Inputs, make_inputs
from tests.refusals import Arguments
from tests.test_api import DEVICES, attend, cache_arguments

on_every_device = pytest.mark.parametrize("device", DEVICES)


def lse_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(result, tuple)
    return result[1]


def ways_to_an_lse(device: str) -> dict[str, Tensor]:
    """Two sequences, of 3 and of 290 keys, whose queries are 0, and so are their scores."""
    _, cache, _ = make_inputs(Case(capacity=300, seqlens=(3, 290), dtype=torch.float16), device=device)
    k, v, lengths = cache.k, cache.v, cache.cache_seqlens
    q = k.new_zeros(2, 1, 4, 32)
    offsets, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ((0, 1, 2), (0, 3, 293)))
    packed_k, packed_v = (torch.cat((x[0, :3], x[1, :290])) for x in (k, v))
    ragged: Arguments = {"cu_seqlens_q": offsets, "max_q_len": 1, "cache_seqlens": lengths}
    parts = []
    for x, y, live in (
        (k[:, :20], v[:, :20], lengths.clamp(max=20)),
        (k[:, 20:], v[:, 20:], (lengths - 20).clamp(min=0)),
    ):
        part = fd.decode_attention(q, x, y, cache_seqlens=live, return_lse=True)
        assert isinstance(part, tuple)
        parts.append(part)
    split = fd.decode_attention(q, k, v, cache_seqlens=lengths, num_splits=4, return_lse=True)
    varlen = flash_attn_varlen_func(
        q[:, 0], packed_k, packed_v, offsets, ends, 1, 290, return_attn_probs=True
    )
    kvcache = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, return_softmax_lse=True)
    return {
        "dense": lse_of(fd.decode_attention(q, k, v, cache_seqlens=lengths, return_lse=True)),
        "dense, split": lse_of(split),
        "ragged": lse_of(fd.decode_attention_varlen(q[:, 0], k, v, **ragged, return_lse=True)),
        "ragged, packed keys": lse_of(varlen),
        "dense, flash-attn": lse_of(kvcache),
        "dense, merged": fd.merge_attention([part[0] for part in parts], [part[1] for part in parts])[1],
    }


def seen_otherwise(view: str, device: str) -> tuple[Inputs, Case]:
    """Inputs whose tensors are views: into other orders, wider rows, wider tables, or one shared row."""
    layouts: Arguments = {"heads first": {"layout": "bhsd"}, "wider rows": {"layout": "padded"}}
    case = Case(capacity=304, seqlens=(304, 20), q_len=2, causal=True, page_size=8 * (view == "wider table"))
    case = dataclasses.replace(case, **layouts.get(view, {}))
    queries, cache, options = make_inputs(case, device=device)
    if cache.block_table is not None:
        wide = torch.nn.functional.pad(cache.block_table, (2, 1), value=-1)
        cache = dataclasses.replace(cache, block_table=wide[:, 2:-1])
    if view == "shared row":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (cache.k, cache.v))
        cache = dataclasses.replace(cache, k=k, v=v)
    return Inputs(queries, cache, options), case


def allocated(call: Callable[[], object], device: str) -> int:
    """Bytes: of the largest operator on a CPU, of the whole call at its peak on a GPU."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    return max(int(event.self_cpu_memory_usage) for event in recorded.events())


def sees(slot: int, token: int, length: int, window: tuple[int, int]) -> bool:
    """The definition, for 4 query tokens: the last of them is at the last live slot."""
    left, right = window
    position = length - 4 + token
    is_near = (left < 0 or slot >= position - left) and (right < 0 or slot <= position + right)
    return slot < length and is_near


def step(inputs: Inputs, case: Case) -> tuple[Tensor, ...]:
    """Every kind of call once, as an engine makes them: append, attend, attend to ragged queries, merge."""
    queries, cache, _ = inputs
    k, v = cache.k[:, :1].clone(), cache.v[:, :1].clone()
    lengths = cache.cache_seqlens
    fd.append_kv(k, v, cache.k, cache.v, cache_seqlens=lengths)
    out, lse = attend(inputs, case)
    ragged: Arguments = {
        "cu_seqlens_q": torch.arange(3, dtype=torch.int32, device=lengths.device),
        "max_q_len": 1,
        "cache_seqlens": lengths,
    }
    fd.decode_attention_varlen(queries.q[:, 0], cache.k, cache.v, **ragged)
    flash_attn_with_kvcache(queries.q, cache.k, cache.v, k, v, cache_seqlens=lengths)
    fd.decode_attention(queries.q, cache.k, cache.v, cache_seqlens=7)
    return out, lse, *fd.merge_attention([out, out], [lse, lse])


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def with_unused_pages(inputs: Inputs, page: int) -> Inputs:
    """Every entry of the block table that no length reaches is ``page``; without a table, nothing differs."""
    queries, cache, options = inputs
    if cache.block_table is None:
        return inputs
    used = -(-cache.cache_seqlens // cache.page_size)
    columns = torch.arange(cache.block_table.shape[1], device=used.device)
    table = cache.block_table.where(columns < used[:, None], page)
    return Inputs(queries, dataclasses.replace(cache, block_table=table), options)


def only(inputs: Inputs, b: int) -> Inputs:
    """Sequence ``b`` without its neighbours, its keys where they lie."""
    queries, cache, options = inputs
    row = torch.tensor([b], dtype=torch.int32, device=queries.q.device)
    alone = dataclasses.replace(cache, cache_seqlens=cache.cache_seqlens[b : b + 1], cache_batch_idx=row)
    return Inputs(dataclasses.replace(queries, q=queries.q[b : b + 1]), alone, options)


def contents(tensors: dict[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
    """What is in each tensor now, and how often PyTorch has seen it change."""
    return {name: (x._version, x.clone()) for name, x in tensors.items()}


def changed(tensors: dict[str, Tensor], before: dict[str, tuple[int, Tensor]]) -> set[str]:
    """The tensors that were written to since, by their bits or by their version."""
    same = {n for n, (version, x) in before.items() if version == tensors[n]._version and x.equal(tensors[n])}
    return set(tensors) - same


def writable(cache: KVCache) -> Arguments:
    """The arguments of an append to a cache."""
    return {
        name: x for name, x in cache_arguments(cache).items() if name not in ("cache_leftpad", "key_mask")
    }


def same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
