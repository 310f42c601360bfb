"""Work shared across sequences: the same results as any other way to share it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_decoding import execute
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.inputs import KeyMask
from tests.kernel_cases import EDGES, plan_of, random_case, runnable

ON_GPU = torch.cuda.is_available()
SWEEP = range(200) if ON_GPU else range(10)
LENGTHS = (300, 1, 0, 17, 64, 0)


def run_and_check(case: Case, device: torch.device, runs: int) -> None:
    inputs = make_inputs(runnable(case, device), device=device)
    out, lse = execute.run_kernels(*inputs, plan_of(inputs, runs=runs))
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("runs", [1, 5])
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case: Case, runs: int, device: torch.device) -> None:
    run_and_check(case, device, runs)


@pytest.mark.parametrize("runs", [*range(1, 9), 40])
def test_every_number_of_runs(runs: int, device: torch.device) -> None:
    """From one run over all sequences to more runs than there are tiles: most begin and end inside one."""
    run_and_check(Case(batch=6, capacity=320, seqlens=LENGTHS), device, runs)


@pytest.mark.parametrize("seed", SWEEP)
def test_random_sweep(seed: int, device: torch.device) -> None:
    dims = (16, 64, 80, 128, 256) if ON_GPU else (16, 40, 64)
    case = random_case(1000 + seed, longest=2000 if ON_GPU else 150, head_dims=dims)
    run_and_check(case, device, (2, 3, 11)[seed % 3])


def test_more_sequences_than_are_looked_at_together(device: torch.device) -> None:
    lengths = tuple((7 * i) % 50 for i in range(140))
    run_and_check(Case(batch=140, heads_q=2, heads_kv=1, capacity=64, seqlens=lengths), device, 9)


@pytest.mark.parametrize("sinks", [False, True])
def test_no_keys_at_all(sinks: bool, device: torch.device) -> None:
    run_and_check(Case(batch=3, capacity=64, seqlens=(0, 0, 0), sinks=sinks), device, 4)


@pytest.mark.parametrize("key_mask", ["", "far"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_dead_slots_change_no_bit(page_size: int, key_mask: KeyMask, device: torch.device) -> None:
    case = Case(batch=3, capacity=160, seqlens=(150, 17, 0), leftpad=(3, 0, 0), page_size=page_size, q_len=2)
    case = dataclasses.replace(case, key_mask=key_mask)
    outs = []
    for filling in (0.0, float("nan")):
        inputs = make_inputs(case, device=device, poison=filling)
        outs.append(execute.run_kernels(*inputs, plan_of(inputs, runs=4)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_same_call_same_bits(device: torch.device) -> None:
    inputs = make_inputs(Case(batch=6, capacity=320, seqlens=LENGTHS), device=device)
    plan = plan_of(inputs, runs=7)
    first, _ = execute.run_kernels(*inputs, plan)
    for _ in range(100 if ON_GPU else 2):
        again, _ = execute.run_kernels(*inputs, plan)
        assert torch.equal(first, again)


def test_one_plan_serves_all_lengths(device: torch.device) -> None:
    """Lengths change on the device while plan, grid and scratch stay: nothing depends on them."""
    inputs = make_inputs(Case(batch=6, capacity=320, seqlens=LENGTHS), device=device)
    plan = plan_of(inputs, runs=5)
    queries, cache, options = inputs
    for lengths in ((0, 0, 0, 0, 0, 0), (320, 320, 320, 320, 320, 320), (1, 320, 2, 0, 63, 64)):
        cache.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        cache.k.nan_to_num_(0.0)
        cache.v.nan_to_num_(0.0)
        out, lse = execute.run_kernels(queries, cache, options, plan)
        assert_close_to_reference(out, lse, *inputs)
