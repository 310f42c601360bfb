"""The public functions: results of the reference; conventions of lengths, merging and writing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import InvalidInput, ops, reference
from flash_decoding.flash_attn import flash_attn_with_kvcache
from flash_decoding.spec import KVCache, NewTokens, Queries, Rotary
from tests.helpers import Case, Inputs, assert_close_to_reference, make_inputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cache_arguments(cache: KVCache) -> dict[str, Any]:
    return {
        "k_cache": cache.k,
        "v_cache": cache.v,
        "cache_seqlens": cache.cache_seqlens,
        "block_table": cache.block_table,
        "cache_batch_idx": cache.cache_batch_idx,
        "cache_leftpad": cache.cache_leftpad,
        "key_mask": cache.key_mask,
    }


def score_arguments(inputs: Inputs, case: Case) -> dict[str, Any]:
    return {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": inputs.options.alibi_slopes,
        "sinks": inputs.options.sinks,
    }


def attend(inputs: Inputs, case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    """The public call that goes with a case."""
    queries, cache, _ = inputs
    arguments = cache_arguments(cache) | score_arguments(inputs, case) | more | {"return_lse": True}
    if queries.is_ragged:
        ragged: dict[str, Any] = {"cu_seqlens_q": queries.cu_seqlens_q, "max_q_len": queries.max_q_len}
        result = fd.decode_attention_varlen(queries.q, **arguments, **ragged)
    else:
        result = fd.decode_attention(queries.q, **arguments)
    assert isinstance(result, tuple)
    return result


CASES = [
    Case(name="decode", heads_q=16, seqlens=(3, 64)),
    Case(name="empty_row", seqlens=(0, 17), causal=True),
    Case(name="holes", key_mask="short", page_size=16, q_len=2, causal=True, sinks=True),
    Case(name="double", dtype=torch.float64, q_len=2, causal=True),
    Case(name="speculative", q_len=5, causal=True, dtype=torch.bfloat16, seqlens=(5, 60), layout="padded"),
    Case(name="page_of_one", page_size=1, seqlens=(9, 33), causal=True, batch_idx=True),
    Case(
        name="everything",
        page_size=8,
        q_lens=(3, 1),
        seqlens=(20, 51),
        leftpad=(4, 0),
        batch_idx=True,
        causal=True,
        window=(11, 0),
        softmax_scale=0.2,
        softcap=4.0,
        alibi="batch",
        sinks=True,
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, num_splits: int, device: str) -> None:
    if device == "cuda" and case.dtype == torch.float64:
        case = dataclasses.replace(case, dtype=torch.float32)
    inputs = make_inputs(case, device=device)
    out, lse = attend(inputs, case, num_splits=num_splits)
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_come_as_a_tensor_an_int_or_the_capacity(device: str) -> None:
    inputs = make_inputs(Case(seqlens=(24, 24), capacity=24), device=device)
    queries, cache, options = inputs
    results = [
        fd.decode_attention(queries.q, cache.k, cache.v, cache_seqlens=lengths, return_lse=True)
        for lengths in (cache.cache_seqlens, 24, None)
    ]
    for out, lse in results:
        assert_close_to_reference(out, lse, queries, cache, options)
    alone = fd.decode_attention(queries.q, cache.k, cache.v)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, results[2][0])


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_is_causal_unless_told_otherwise(device: str) -> None:
    case = Case(q_len=3, seqlens=(9, 20))
    inputs = make_inputs(case, device=device)
    queries, cache, _ = inputs
    default = fd.decode_attention(queries.q, cache.k, cache.v, cache_seqlens=cache.cache_seqlens)
    causal, _ = attend(inputs, dataclasses.replace(case, causal=True))
    bidirectional, _ = attend(inputs, case)
    assert isinstance(default, Tensor)
    assert torch.equal(default, causal)
    assert not torch.equal(default, bidirectional)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [0, 16])
def test_batch_invariant_bits_do_not_depend_on_the_neighbours(page_size: int, device: str) -> None:
    case = Case(batch=3, capacity=1500, seqlens=(1400, 3, 700), page_size=page_size, heads_q=8)
    queries, cache, _ = inputs = make_inputs(case, device=device)
    out, lse = attend(inputs, case, batch_invariant=True)
    assert_close_to_reference(out, lse, *inputs)
    for b in range(3):
        rows = slice(b, b + 1)
        table = cache.block_table
        pool = (cache.k[rows], cache.v[rows]) if table is None else (cache.k, cache.v)
        alone = fd.decode_attention(
            queries.q[rows],
            *pool,
            cache_seqlens=cache.cache_seqlens[rows],
            block_table=None if table is None else table[rows],
            causal=False,
            batch_invariant=True,
            return_lse=True,
        )
        assert torch.equal(alone[0], out[rows])
        assert torch.equal(alone[1], lse[rows])


def test_how_to_split_reaches_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of splits changes no result that a test could see, so it is looked for on its way."""
    seen: list[tuple[int, bool]] = []

    def attention(
        queries: Queries, *_: object, num_splits: int = 0, batch_invariant: bool = False, **rest: object
    ) -> tuple[Tensor, Tensor]:
        seen.append((num_splits, batch_invariant))
        return queries.q, queries.q

    monkeypatch.setattr(ops, "attention", attention)
    queries, cache, _ = make_inputs(Case(q_lens=(1, 1), seqlens=(4, 5)))
    dense = queries.q[:, None]
    arguments: dict[str, Any] = {"cache_seqlens": cache.cache_seqlens, "num_splits": 7}
    fd.decode_attention(dense, cache.k, cache.v, **arguments, batch_invariant=True)
    ragged: dict[str, Any] = {"cu_seqlens_q": queries.cu_seqlens_q, "max_q_len": 1}
    fd.decode_attention_varlen(queries.q, cache.k, cache.v, **ragged, **arguments, batch_invariant=True)
    flash_attn_with_kvcache(dense, cache.k, cache.v, **arguments)
    assert seen == [(7, True), (7, True), (7, False)]


APPENDS = [
    dict(zip(("page_size", "interleaved", "advance_q", "with_q", "dtype"), values, strict=True))
    for values in itertools.product(
        (0, 5), (False, True), (False, True), (False, True), (torch.float32, torch.bfloat16)
    )
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", APPENDS, ids=lambda how: "-".join(str(value) for value in how.values()))
def test_append(how: dict[str, Any], device: str) -> None:
    """Into the slots behind the live ones and nowhere else; what would lie beyond the capacity is dropped."""
    case = Case(page_size=how["page_size"], capacity=20, seqlens=(3, 18), new_tokens=3, batch_idx=True)
    queries, cache, _ = make_inputs(dataclasses.replace(case, dtype=how["dtype"]), device=device)
    k, v = (torch.randn(2, 3, 2, 32).to(queries.q) for _ in range(2))
    angles = torch.randn(20, 8)
    tables = angles.cos().to(k), angles.sin().to(k)
    q = torch.randn(2, 2, 4, 32).to(queries.q) if how["with_q"] else None
    lengths = cache.cache_seqlens.clone()
    ours = dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone(), cache_leftpad=None)
    arguments = {
        name: x for name, x in cache_arguments(ours).items() if name not in ("cache_leftpad", "key_mask")
    }
    rotation = {"rotary_cos": tables[0], "rotary_sin": tables[1], "q": q, "advance_q": how["advance_q"]}
    turned = fd.append_kv(k, v, **arguments, **rotation, rotary_interleaved=how["interleaved"])
    rotary = Rotary(*tables, how["interleaved"], how["advance_q"])
    expected = None if q is None else torch.empty_like(q)
    reference.append(NewTokens(k, v, rotary, q, expected), cache)
    assert torch.equal(cache.cache_seqlens, lengths)
    assert_same_tokens(ours.v, cache.v, ulps=0)
    assert_same_tokens(ours.k, cache.k, ulps=2)
    assert (turned is None) is (expected is None)
    if turned is not None and expected is not None:
        assert turned.is_contiguous()
        assert_same_tokens(turned, expected, ulps=2)


def assert_same_tokens(ours: Tensor, expected: Tensor, *, ulps: int) -> None:
    """The same slots are filled (others hold NaN), with the same values up to units in the last place.

    Two units of the largest element are right for rotated ones: ``a cos - b sin`` is at most |a| + |b| in
    size, and each side rounds it once from finer arithmetic.
    """
    assert torch.equal(ours.isnan(), expected.isnan())
    error, largest = (ours - expected).nan_to_num().abs().max(), expected.nan_to_num().abs().max()
    assert error <= ulps * torch.finfo(ours.dtype).eps * largest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_over_disjoint_keys_merge_to_the_whole(dtype: torch.dtype, device: str) -> None:
    """Keys shared out over three caches, as several devices would hold them; one of them is empty."""
    case = Case(dtype=dtype, heads_q=8, seqlens=(40, 7), sinks=False)
    queries, cache, options = make_inputs(case, device=device)
    bounds = ((0, 6), (6, 64), (64, 64))
    parts = []
    for lo, hi in bounds:
        lengths = (cache.cache_seqlens - lo).clamp(0, hi - lo)
        part = fd.decode_attention(
            queries.q, cache.k[:, lo:hi], cache.v[:, lo:hi], cache_seqlens=lengths, return_lse=True
        )
        parts.append(part)
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    assert (lses[2] == -math.inf).all()
    out, lse = fd.merge_attention(outs, lses)
    assert_close_to_reference(out, lse, queries, cache, options)
    stacked = fd.merge_attention(torch.stack(outs), torch.stack(lses))
    assert torch.equal(stacked[0], out)
    assert torch.equal(stacked[1], lse)


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_parts_merge_like_a_batch_of_one(device: str) -> None:
    outs, lses = torch.randn(3, 7, 4, 16, device=device), torch.randn(3, 4, 7, device=device)
    out, lse = fd.merge_attention(outs, lses)
    batched = fd.merge_attention(outs.unsqueeze(1), lses.unsqueeze(1))
    assert out.shape == (7, 4, 16)
    assert lse.shape == (4, 7)
    assert torch.equal(out, batched[0][0])
    assert torch.equal(lse, batched[1][0])


@pytest.mark.parametrize("device", DEVICES)
def test_empty_parts_merge_to_an_empty_one(device: str) -> None:
    """Whatever an empty part holds as output, NaN included, counts for nothing."""
    outs = torch.full((2, 1, 1, 4, 16), math.nan, device=device)
    lses = torch.full((2, 1, 4, 1), -math.inf, device=device)
    out, lse = fd.merge_attention(outs, lses)
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()
    one = fd.merge_attention(torch.ones_like(outs[:1]), torch.zeros_like(lses[:1]))
    assert (one[0] == 1).all()
    assert (one[1] == 0).all()


def test_caches_hand_over_their_arguments() -> None:
    for cache in (fd.ContiguousCache(2, 8, 2, 16), fd.PagedCache(4, 4, 2, 16, max_batch=2, max_pages=2)):
        cache.allocate(3)
        cache.advance(3)
        k, v = torch.randn(2, 3, 2, 16).bfloat16(), torch.randn(2, 3, 2, 16).bfloat16()
        fd.append_kv(k, v, **cache.writing())
        queries = Queries(torch.randn(2, 1, 4, 16).bfloat16())
        result = fd.decode_attention(queries.q, **cache.reading(), return_lse=True)
        dense = KVCache(k, v, torch.tensor([3, 3], dtype=torch.int32))
        options = make_inputs(Case(head_dim=16)).options
        assert isinstance(result, tuple)
        assert_close_to_reference(result[0], result[1], queries, dense, options)


def test_explain_and_warmup_answer_without_a_gpu() -> None:
    text = str(fd.explain(batch=1, heads_q=16, heads_kv=2, head_dim=128, kv_len=65536, gpu="H200"))
    assert "Flash-Decoding" in text
    fd.warmup(heads_q=16, heads_kv=2, head_dim=128, page_sizes=(0, 16), device="cpu")
    with pytest.raises(InvalidInput, match="heads_q: got 15; wanted a multiple of heads_kv = 2"):
        fd.warmup(heads_q=15, heads_kv=2, head_dim=128)
    with pytest.raises(InvalidInput, match="head_dim_v: got head_dim 20; wanted a multiple of 8"):
        fd.warmup(heads_q=16, heads_kv=2, head_dim=128, head_dim_v=20)


def test_what_is_public_is_there_and_nothing_else_is() -> None:
    assert sorted(fd.__all__) == fd.__all__
    assert all(hasattr(fd, name) for name in fd.__all__)
    assert {"append_kv", "decode_attention", "decode_attention_varlen", "merge_attention"} <= set(fd.__all__)
