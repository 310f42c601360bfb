"""Batch-invariant mode: a sequence's own length decides, its capacity, pages and neighbours do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from flash_decoding import execute
from flash_decoding.invariant import MOST_SPLITS
from flash_decoding.spec import KVCache
from tests.helpers import Case, Inputs, assert_close_to_reference, make_inputs
from tests.kernel_cases import plan_of
from tests.test_kernels_fixed import alone, results_of, small_splits

LONG = Case(
    name="long", batch=3, capacity=17_600, seqlens=(17_001, 70, 16_500), heads_q=2, heads_kv=1, head_dim=16
)


def with_capacity(inputs: Inputs, capacity: int) -> Inputs:
    """The same keys in a contiguous cache with fewer slots."""
    cache = inputs.cache
    return inputs._replace(cache=dataclasses.replace(cache, k=cache.k[:, :capacity], v=cache.v[:, :capacity]))


def in_larger_pool(inputs: Inputs, pages: int, columns: int) -> Inputs:
    """The same keys in a pool with more pages, through a table with more columns that have none."""
    cache = inputs.cache
    assert cache.block_table is not None
    larger = KVCache(
        torch.cat([cache.k, torch.full_like(cache.k[:pages], float("nan"))]),
        torch.cat([cache.v, torch.full_like(cache.v[:pages], float("nan"))]),
        cache.cache_seqlens,
        pad(cache.block_table, (0, columns)),
    )
    return inputs._replace(cache=larger)


def assert_same(mine: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(mine[0], other[0])
    assert torch.equal(mine[1], other[1])


@pytest.mark.parametrize("page_size", [0, 64])
def test_more_than_the_most_splits_make_them_larger(page_size: int, device: torch.device) -> None:
    """17001 keys are 133 tiles of 128, more than there may be splits; in pages 266 of 64."""
    case = dataclasses.replace(LONG, page_size=page_size)
    inputs = make_inputs(case, device=device)
    plan = dataclasses.replace(small_splits(inputs, runs=7, tiles=1), num_splits=MOST_SPLITS)
    assert plan.split_tokens * MOST_SPLITS < 16_500
    together = execute.run_kernels(*inputs, plan)
    assert_close_to_reference(together[0], together[1], *inputs)
    for b in range(case.batch):
        single = alone(inputs, b)
        assert_same(
            execute.run_kernels(*single, dataclasses.replace(plan, runs=0)), results_of(inputs, b, *together)
        )


@pytest.mark.parametrize("runs", [0, 3])
def test_capacity_changes_no_bit(runs: int, device: torch.device) -> None:
    inputs = make_inputs(dataclasses.replace(LONG, capacity=5000, seqlens=(1, 70, 640)), device=device)
    together = execute.run_kernels(*inputs, small_splits(inputs, runs=runs, tiles=1))
    assert_close_to_reference(together[0], together[1], *inputs)
    for capacity in (640, 1300, 2200):
        smaller = with_capacity(inputs, capacity)
        assert_same(execute.run_kernels(*smaller, small_splits(smaller, tiles=1)), together)


@pytest.mark.parametrize("runs", [0, 3])
def test_pages_change_no_bit(runs: int, device: torch.device) -> None:
    case = dataclasses.replace(LONG, capacity=704, seqlens=(1, 70, 640), page_size=16)
    inputs = make_inputs(case, device=device)
    together = execute.run_kernels(*inputs, small_splits(inputs, tiles=1))
    larger = in_larger_pool(inputs, pages=5, columns=100)
    assert_same(execute.run_kernels(*larger, small_splits(larger, runs=runs, tiles=1)), together)


def test_one_split_has_the_bits_of_one_among_many(device: torch.device) -> None:
    """In the planner's own plans: a capacity of one split writes results, larger ones write parts."""
    case = dataclasses.replace(LONG, capacity=2100, seqlens=(1000, 70, 0), sinks=True)
    inputs = make_inputs(case, device=device)
    few = with_capacity(inputs, 1024)
    plans = [dataclasses.replace(plan_of(x, batch_invariant=True), by_leaf=False) for x in (inputs, few)]
    plans = [dataclasses.replace(plan, num_splits=n) for plan, n in zip(plans, (3, 1), strict=True)]
    out, lse = execute.run_kernels(*inputs, plans[0])
    assert_close_to_reference(out, lse, *inputs)
    assert_same(execute.run_kernels(*few, plans[1]), (out, lse))
