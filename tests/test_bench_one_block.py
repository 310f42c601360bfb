"""The stand-in for FasterTransformer's kernel: right on what it takes, and refusing the rest by name."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_decoding import ContiguousCache, append_kv, reference
from flash_decoding.bench.baselines import decoder_models, one_block, vllm_block
from flash_decoding.errors import Unsupported
from flash_decoding.spec import KVCache, Options, Queries
from tests.helpers import assert_close_to_reference


def problem(
    device: torch.device, dtype: torch.dtype, *, group: int, head_dim: int, new_tokens: int = 1
) -> tuple[Queries, KVCache, Options]:
    """Nothing but what is new, one key, a tile and a bit, and a full cache; NaN where nothing lives."""
    capacity, heads_kv, lengths = 200, 2, [new_tokens, 1, 65, 200]
    q = torch.randn(4, 1, heads_kv * group, head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, 4, capacity, heads_kv, head_dim, dtype=dtype, device=device)
    for row, length in enumerate(lengths):
        k[row, length:] = v[row, length:] = torch.nan
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device) - new_tokens
    options = Options.make(head_dim=head_dim, causal=True)
    return Queries(q), KVCache(k, v, seqlens, new_tokens=new_tokens), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_dim", "new_tokens"), [(1, 64, 0), (4, 128, 1), (3, 80, 0)])
def test_the_stand_in_is_attention(
    device: torch.device, dtype: torch.dtype, group: int, head_dim: int, new_tokens: int
) -> None:
    queries, cache, options = problem(device, dtype, group=group, head_dim=head_dim, new_tokens=new_tokens)
    out = decoder_models.one_block(queries, cache, options)
    assert_close_to_reference(out, None, queries, cache, options)


def test_the_stand_in_follows_strides(device: torch.device) -> None:
    """Heads before slots, and queries cut out of a wider tensor."""
    queries, cache, options = problem(device, torch.float32, group=2, head_dim=64)
    wide = torch.cat((queries.q, torch.randn_like(queries.q)), 2)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cache.k, cache.v))
    queries, cache = Queries(wide[:, :, :4]), replace(cache, k=k, v=v)
    assert_close_to_reference(one_block.attend(queries, cache, options), None, queries, cache, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 8])
def test_flash_attention_unsplit_is_attention(device: torch.device, dtype: torch.dtype, group: int) -> None:
    queries, cache, options = problem(device, dtype, group=group, head_dim=128)
    out = decoder_models.unsplit_flash(queries, cache, options)
    assert_close_to_reference(out, None, queries, cache, options)


class FakeOps(types.ModuleType):
    """What vLLM's two functions do, in PyTorch, on the layout that its kernels read."""

    @staticmethod
    def reshape_and_cache(
        key: Tensor, value: Tensor, k: Tensor, v: Tensor, places: Tensor, *_: object
    ) -> None:
        for token, place in enumerate(places.tolist()):
            page, offset = divmod(place, k.shape[3])
            k[page, :, :, offset] = key[token].view(k.shape[1], k.shape[2], k.shape[4])
            v[page, :, :, offset] = value[token]

    @staticmethod
    def paged_attention_v1(*arguments: Any) -> None:
        out, q, k, v, heads, scale, pages, lengths, page_size = arguments[:9]
        assert (k.shape[1], v.shape[3]) == (heads, page_size)
        keys = k.permute(0, 3, 1, 2, 4).flatten(3)
        values = v.permute(0, 3, 1, 2)
        cache = KVCache(keys, values, lengths, block_table=pages)
        options = Options.make(head_dim=q.shape[-1], softmax_scale=scale)
        out.copy_(reference.attend(Queries(q[:, None]), cache, options)[0][:, 0])


def test_the_copy_in_vllms_layout_follows_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two layers, and again after a rewind; each layer has a copy of its own."""
    package = types.ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setattr(package, "_custom_ops", FakeOps("vllm._custom_ops"), raising=False)
    storage = ContiguousCache(3, 64, 2, 32, layers=2, dtype=torch.float32)
    storage.keys.normal_()
    storage.values.normal_()
    storage.allocate([5, 17, 40])
    storage.advance(torch.tensor([5, 17, 40], dtype=torch.int32))
    attend, options = vllm_block.VllmBlock(), Options.make(head_dim=32, causal=True)
    for step in range(4):
        if step == 2:
            for row, length in enumerate([5, 17, 40]):
                storage.truncate(row, length)
        storage.allocate(1)
        storage.advance(1)
        for layer in range(2):
            k, v = torch.randn(2, 3, 1, 2, 32)
            append_kv(k, v, **storage.writing(layer))
            cache = replace(storage.view(layer), cache_seqlens=storage.starts, new_tokens=1)
            queries = Queries(torch.randn(3, 1, 4, 32))
            out = attend(queries, cache, options)
            assert_close_to_reference(out, None, queries, cache, options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_table": torch.zeros(4, 1, dtype=torch.int32)}, "pages"),
        ({"cache_batch_idx": torch.arange(4, dtype=torch.int32)}, "rows of the cache in order"),
        ({"cache_leftpad": torch.zeros(4, dtype=torch.int32)}, "padding"),
        ({"key_mask": torch.ones(4, 200, dtype=torch.bool)}, "padding"),
    ],
)
def test_caches_that_a_stand_in_does_not_know_are_refused(
    change: dict[str, torch.Tensor], reason: str
) -> None:
    queries, cache, options = problem(torch.device("cpu"), torch.float32, group=1, head_dim=64)
    attend = decoder_models.plain_only(decoder_models.one_block, "the stand-in")
    with pytest.raises(Unsupported, match=reason):
        attend(queries, replace(cache, **change), options)  # type: ignore[arg-type]  # tensors, all of them


def test_queries_and_options_that_a_stand_in_does_not_know_are_refused() -> None:
    queries, cache, options = problem(torch.device("cpu"), torch.float32, group=1, head_dim=64)
    attend = decoder_models.plain_only(decoder_models.one_block, "the stand-in")
    with pytest.raises(Unsupported, match="one token per sequence"):
        attend(Queries(queries.q.expand(4, 2, -1, -1)), cache, options)
    with pytest.raises(Unsupported, match="no window"):
        attend(queries, cache, replace(options, window_left=3))
