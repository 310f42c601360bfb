"""The attention kernel and the combine, interpreted on a CPU or compiled on a GPU, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_decoding import execute
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.inputs import KeyMask
from tests.kernel_cases import EDGES, plan_of, random_case, runnable

ON_GPU = torch.cuda.is_available()
SWEEP = range(400) if ON_GPU else range(20)
HEAD_DIMS = (16, 40, 64, 80, 96, 112, 128, 192, 256) if ON_GPU else (16, 24, 40, 64)
LONGEST = 2000 if ON_GPU else 150


def run_and_check(
    case: Case, device: torch.device, num_splits: int, *, batch_invariant: bool = False
) -> None:
    inputs = make_inputs(runnable(case, device), device=device)
    plan = plan_of(inputs, num_splits=num_splits, batch_invariant=batch_invariant)
    out, lse = execute.run_kernels(*inputs, plan)
    assert_close_to_reference(out, lse, *inputs)
    if plan.roles:  # what the planner prefers to the portable kernel is tested against it
        portable = dataclasses.replace(plan, roles=False)
        portable_out, portable_lse = execute.run_kernels(*inputs, portable)
        assert_close_to_reference(portable_out, portable_lse, *inputs)
        assert torch.equal(lse.isinf(), portable_lse.isinf())


@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case: Case, num_splits: int, device: torch.device) -> None:
    run_and_check(case, device, num_splits)


@pytest.mark.parametrize("case", EDGES[::4], ids=str)
def test_batch_invariant_plans_are_exact_too(case: Case, device: torch.device) -> None:
    run_and_check(case, device, 0, batch_invariant=True)


@pytest.mark.parametrize("num_splits", range(1, 10))
def test_every_split_count(num_splits: int, device: torch.device) -> None:
    """Nine tiles of 32 keys: from one split to one a tile, for sequences that fill all, some and none."""
    run_and_check(Case(batch=4, capacity=288, seqlens=(288, 33, 0, 257)), device, num_splits)


@pytest.mark.parametrize("seed", SWEEP)
def test_random_sweep(seed: int, device: torch.device) -> None:
    case = random_case(seed, longest=LONGEST, head_dims=HEAD_DIMS)
    run_and_check(case, device, (0, 1, 2, 7)[seed % 4])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key_mask", ["", "far"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_dead_slots_change_no_bit(
    poison: float, page_size: int, key_mask: KeyMask, device: torch.device
) -> None:
    """The same call over a cache whose dead and hidden slots hold 0, and one where they hold the poison."""
    case = Case(batch=3, capacity=160, seqlens=(150, 17, 0), leftpad=(3, 0, 0), page_size=page_size, q_len=2)
    case = dataclasses.replace(case, key_mask=key_mask)
    outs = []
    for filling in (0.0, poison):
        inputs = make_inputs(case, device=device, poison=filling)
        outs.append(execute.run_kernels(*inputs, plan_of(inputs, num_splits=4)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_same_call_same_bits(device: torch.device) -> None:
    inputs = make_inputs(Case(batch=2, capacity=300, seqlens=(300, 170), dtype=torch.float16), device=device)
    plan = plan_of(inputs, num_splits=4)
    first, _ = execute.run_kernels(*inputs, plan)
    for _ in range(100 if ON_GPU else 2):
        again, _ = execute.run_kernels(*inputs, plan)
        assert torch.equal(first, again)


@pytest.mark.parametrize("page_size", [0, 16])
def test_batch_invariant_bits_do_not_depend_on_neighbours(page_size: int, device: torch.device) -> None:
    """A sequence alone and the same one in a batch of three: equal bits, with splits of 512 keys."""
    lengths = (1300, 40, 700)
    case = Case(batch=3, capacity=1400, seqlens=lengths, page_size=page_size, heads_q=2, heads_kv=1)
    queries, cache, options = make_inputs(case, device=device)
    plan = plan_of(make_inputs(case, device=device), batch_invariant=True)
    assert plan.num_splits > 1
    together, lse_together = execute.run_kernels(queries, cache, options, plan)
    for b in range(3):
        rows = slice(b, b + 1)
        alone = type(cache)(
            cache.k if page_size else cache.k[rows],
            cache.v if page_size else cache.v[rows],
            cache.cache_seqlens[rows],
            None if cache.block_table is None else cache.block_table[rows],
        )
        single = (type(queries)(queries.q[rows]), alone, options)
        problem = execute.problem_of(*single, return_lse=True)
        assert problem.batch == 1
        out, lse = execute.run_kernels(*single, plan)
        assert torch.equal(out[0], together[b])
        assert torch.equal(lse[0], lse_together[b])


def test_without_lse(device: torch.device) -> None:
    for num_splits in (1, 3):
        inputs = make_inputs(Case(capacity=100), device=device)
        out, lse = execute.run_kernels(*inputs, plan_of(inputs, num_splits=num_splits), return_lse=False)
        assert lse.numel() == 0
        assert_close_to_reference(out, None, *inputs)


def test_packed_keys_that_begin_inside_a_tile_are_all_read(device: torch.device) -> None:
    """As many keys as a fixed split has, from slot 5 on: they reach into a second split."""
    case = Case(batch=2, q_lens=(1, 1), packed=True, seqlens=(5, 1024), heads_q=2, heads_kv=1, head_dim=16)
    run_and_check(case, device, 0, batch_invariant=True)
