"""The stand-in for FasterTransformer's kernel: right on what it takes, and refusing the rest by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_decoding.bench.baselines import decoder_models, one_block
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
