"""Appending and merging on a CPU, against the specification."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from flash_decoding import cpu, reference
from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, NewTokens, Rotary
from tests.helpers import Case, make_inputs

CASES = [
    Case(name="contiguous", seqlens=(0, 60)),
    Case(name="full and over", seqlens=(64, 62)),
    Case(name="by index, heads first", seqlens=(3, 17), batch_idx=True, layout="bhsd"),
    Case(name="paged", seqlens=(3, 17), page_size=5, new_tokens=3),
    Case(name="pages of one, by index", seqlens=(0, 61), page_size=1, batch_idx=True, new_tokens=3),
    Case(name="values differ", seqlens=(5, 6), head_dim_v=24, page_size=16, new_tokens=3, layout="padded"),
]


def new_tokens(case: Case, rotary: Rotary | None) -> NewTokens:
    q = torch.randn(case.batch, 2, case.heads_q, case.head_dim).to(case.dtype)
    return NewTokens(
        torch.randn(case.batch, 3, case.heads_kv, case.head_dim).to(case.dtype),
        torch.randn(case.batch, 3, case.heads_kv, case.value_dim).to(case.dtype),
        rotary,
        None if rotary is None else q,
        None if rotary is None else torch.empty_like(q),
    )


def rotary_of(dtype: torch.dtype, rotary_dim: int, *, interleaved: bool, advance_q: bool) -> Rotary:
    angles = torch.arange(65)[:, None] * 100.0 ** (-torch.arange(rotary_dim // 2) / rotary_dim)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype), interleaved, advance_q)


def both(case: Case, new: NewTokens) -> tuple[KVCache, KVCache, Tensor | None, Tensor | None]:
    """The caches and rotated queries that the CPU path and the reference leave behind."""
    ours, theirs = make_inputs(case).cache, make_inputs(case).cache
    cpu.append(new, ours)
    rotated = None if new.q_rotated is None else new.q_rotated.clone()
    reference.append(new, theirs)
    return ours, theirs, rotated, new.q_rotated


def same(x: Tensor, y: Tensor) -> bool:
    """Equal bit by bit, NaN where NaN is."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_land_where_the_reference_puts_them(case: Case, dtype: torch.dtype) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    ours, theirs, _, _ = both(case, new_tokens(case, None))
    assert same(ours.k, theirs.k)
    assert same(ours.v, theirs.v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary_dim", "advance_q"), [(16, True), (32, False)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rotation_is_as_exact_as_the_dtype(
    case: Case, dtype: torch.dtype, interleaved: bool, rotary_dim: int, advance_q: bool
) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    rotary = rotary_of(dtype, rotary_dim, interleaved=interleaved, advance_q=advance_q)
    ours, theirs, rotated, want = both(case, new_tokens(case, rotary))
    assert rotated is not None
    assert want is not None
    # Two products and a sum are three roundings of numbers up to |a| + |b| < 10, in fp32 here and in float64
    # there; both are then rounded to the dtype, to neighbours at worst.
    atol = 3 * 10 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rtol = torch.finfo(dtype).eps
    for got, exact in ((ours.k, theirs.k), (rotated, want)):
        assert torch.allclose(got.double(), exact.double(), rtol=rtol, atol=atol, equal_nan=True)
    assert same(ours.v, theirs.v)


def test_a_missing_page_is_refused_before_anything_is_written() -> None:
    case = Case(seqlens=(3, 17), page_size=5, new_tokens=3)
    cache = make_inputs(case).cache
    assert cache.block_table is not None
    cache.block_table[1, 3] = -7
    k, v = cache.k.clone(), cache.v.clone()
    new = new_tokens(case, rotary_of(torch.float32, 16, interleaved=False, advance_q=True))
    assert new.q_rotated is not None
    new.q_rotated.zero_()
    with pytest.raises(InvalidInput, match="block_table: got -7"):
        cpu.append(new, cache)
    assert same(cache.k, k)
    assert same(cache.v, v)
    assert (new.q_rotated == 0).all()


def partials(dtype: torch.dtype, splits: int) -> tuple[Tensor, Tensor]:
    """Random partial results; some saw nothing and hold NaN, and one row saw nothing anywhere."""
    outs = torch.randn(splits, 3, 4, 6, 16).to(dtype)
    lses = torch.randn(splits, 3, 6, 4) * 5
    lses[torch.rand(lses.shape) < 0.3] = -math.inf
    lses[:, 1, 2, 3] = -math.inf
    outs[(lses == -math.inf).transpose(-1, -2)] = math.nan
    return outs, lses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_merge_is_the_reference(dtype: torch.dtype, splits: int) -> None:
    outs, lses = partials(dtype, splits)
    out, lse = cpu.merge(outs, lses)
    want, want_lse = reference.merge(outs.double(), lses.double())
    # A sum of ``splits`` products in fp32, each weight a few roundings old, then one rounding to the dtype.
    unit, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    largest = outs.nan_to_num().abs().max().item()
    assert torch.allclose(out.double(), want, rtol=unit, atol=(splits + 8) * fp32 * largest)
    assert torch.allclose(lse.double(), want_lse, rtol=4 * fp32, atol=(splits + 8) * fp32)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


def test_merging_nothing_gives_nothing() -> None:
    out, lse = cpu.merge(torch.full((2, 1, 1, 1, 4), math.nan), torch.full((2, 1, 1, 1), -math.inf))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_one_partial_merges_to_itself() -> None:
    outs, lses = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 4, 3)
    out, lse = cpu.merge(outs, lses)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])


def test_partials_of_the_cpu_path_merge_to_the_whole() -> None:
    inputs = make_inputs(Case(capacity=40, dtype=torch.float64))
    queries, cache, options = inputs
    pieces = [
        cpu.attend(queries, KVCache(cache.k[:, lo:hi], cache.v[:, lo:hi], cache.cache_seqlens), options)
        for lo, hi in ((0, 11), (11, 12), (12, 40))
    ]
    out, lse = cpu.merge(torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces]))
    want, want_lse = cpu.attend(*inputs)
    # The LSEs are fp32, and so are the weights that follow from them.
    fp32 = torch.finfo(torch.float32).eps
    assert torch.allclose(out, want, rtol=0, atol=16 * fp32)
    assert torch.allclose(lse, want_lse, rtol=4 * fp32, atol=16 * fp32)
