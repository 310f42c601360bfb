"""Leaves of fixed splits: whether a program has one, or a split of them, or a run, the bits are the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flash_decoding import execute
from flash_decoding.kernels import fold
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.kernel_cases import plan_of, random_case, runnable
from tests.test_kernels_fixed import FEATURES, LENGTHS, small_splits
from tests.test_kernels_own_length import LONG, assert_same, with_capacity

SIZES = ((2, 1), (4, 2), (6, 2), (5, 3))
"""Tiles of a split and of a leaf; the last rounds a split up to whole leaves."""


def assert_ways_agree(case: Case, device: torch.device, tiles: int, leaf: int) -> None:
    inputs = make_inputs(runnable(case, device), device=device)
    sizes: dict[str, Any] = {"tiles": tiles, "leaf": leaf}
    by_split = execute.run_kernels(*inputs, small_splits(inputs, **sizes))
    assert_close_to_reference(by_split[0], by_split[1], *inputs)
    assert_same(execute.run_kernels(*inputs, small_splits(inputs, **sizes, by_leaf=True)), by_split)
    assert_same(execute.run_kernels(*inputs, small_splits(inputs, **sizes, runs=3)), by_split)


@pytest.mark.parametrize("index", range(len(FEATURES)), ids=[str(case) for case in FEATURES])
def test_every_way_has_the_same_bits(index: int, device: torch.device) -> None:
    assert_ways_agree(FEATURES[index], device, *SIZES[index % len(SIZES)])


@pytest.mark.parametrize("seed", range(80 if torch.cuda.is_available() else 4))
def test_random_sweep(seed: int, device: torch.device) -> None:
    case = random_case(3000 + seed, longest=300, head_dims=(16, 40, 64))
    assert_ways_agree(case, device, *SIZES[seed % 4])


def test_bits_of_fewer_parts_than_a_full_split_has(device: torch.device) -> None:
    """A capacity of one split writes its result; by leaves, or in a larger one, it is the same."""
    case = dataclasses.replace(LONG, capacity=2600, seqlens=(1000, 70, 0), dtype=torch.float16)
    inputs = make_inputs(case, device=device)
    few = with_capacity(inputs, 1024)
    assert plan_of(few, batch_invariant=True).by_leaf
    plan = dataclasses.replace(plan_of(few, batch_invariant=True), num_splits=1, by_leaf=False)
    alone = execute.run_kernels(*few, plan)
    assert_close_to_reference(alone[0], alone[1], *few)
    assert_same(execute.run_kernels(*few, plan_of(few, batch_invariant=True)), alone)
    assert_same(execute.run_kernels(*inputs, plan_of(inputs, batch_invariant=True)), alone)


def test_states_that_differ_by_more_than_numbers_hold(device: torch.device) -> None:
    """Scores some hundreds apart: a leaf counts for nothing beside another, before it or behind."""
    case = Case(batch=6, capacity=320, seqlens=LENGTHS, softmax_scale=40.0)
    assert_ways_agree(case, device, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_many_splits_as_lanes(dtype: torch.dtype, device: torch.device) -> None:
    """The reduction of few splits has its lanes in other threads than that of leaves, and the same sums."""
    case = Case(batch=3, capacity=2200, seqlens=(2200, 1500, 70), head_dim=64, dtype=dtype)
    assert small_splits(make_inputs(case, device=device)).num_splits >= fold.LANES.value
    assert_ways_agree(case, device, 2, 1)
