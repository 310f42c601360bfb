"""Warps with roles in all that they can do, whether the planner asks for it or not, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_decoding import execute
from flash_decoding.plan import Hardware
from flash_decoding.plan.tiles import FEW_ROWS
from flash_decoding.spec import Plan, Tile, padded
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.kernel_cases import EDGES

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def suits(case: Case) -> bool:
    """16-bit copies of 16 bytes, no mask; pages of a power of two."""
    return (
        not case.key_mask
        and case.page_size & (case.page_size - 1) == 0
        and case.head_dim % 16 == 0
        and (case.head_dim_v or case.head_dim) % 16 == 0
        and case.layout != "padded"
    )


def need_roles() -> None:
    """Skip a test where there are no warps with roles."""
    if not Hardware.of(DEVICE).gives_warps_roles:
        pytest.skip("needs a Hopper GPU, and a Triton whose Gluon the kernels ran under")


CASES = [dataclasses.replace(case, dtype=torch.bfloat16) for case in EDGES if suits(case)]


def plan_of(case: Case, *, in_flight: int = 0, **changes: int | bool) -> Plan:
    """A plan for warps with roles, of small tiles: parts have several."""
    keys = 64 if padded(max(case.head_dim, case.head_dim_v or 0)) <= 128 else 32
    overlaps = Hardware.of(DEVICE).overlaps_launches
    tile = Tile(FEW_ROWS, keys, 4, 3, in_flight)
    plan = Plan("flash_decoding", "triton", tile, 1, 0, (), overlaps, roles=True)
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]  # fields of both types


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_splits": 1},
        {"num_splits": 3},
        {"num_splits": 3, "programs": 2},
        {"num_splits": 5, "balanced": True},
        {"num_splits": 1, "split_tokens": 1024, "leaf_tokens": 64},
        {"num_splits": 9, "split_tokens": 128, "leaf_tokens": 64},
        {"num_splits": 9, "split_tokens": 128, "leaf_tokens": 64, "runs": 3},
        {"num_splits": 9, "split_tokens": 128, "leaf_tokens": 64, "runs": 2, "by_leaf": True},
    ],
    ids=[
        "whole",
        "splits",
        "one after another",
        "runs",
        "leaves",
        "fixed sizes",
        "runs of fixed sizes",
        "by leaf",
    ],
)
def test_edges(case: Case, changes: dict[str, int | bool]) -> None:
    need_roles()
    inputs = make_inputs(case, device=DEVICE)
    assert execute.problem_of(*inputs, return_lse=True).aligned
    out, lse = execute.run_kernels(*inputs, plan_of(case, **changes))
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_splits": 1},
        {"num_splits": 1, "programs": 2},
        {"num_splits": 3},
        {"num_splits": 5, "balanced": True},
    ],
    ids=["whole", "one after another", "splits", "runs"],
)
def test_no_more_in_flight_than_asked_for(in_flight: int, changes: dict[str, int | bool]) -> None:
    """The bits are those of loading all that there is room for."""
    need_roles()
    case = Case(batch=4, capacity=1000, seqlens=(1000, 3, 0, 257), dtype=torch.bfloat16)
    inputs = make_inputs(case, device=DEVICE)
    out, lse = execute.run_kernels(*inputs, plan_of(case, in_flight=in_flight, **changes))
    assert_close_to_reference(out, lse, *inputs)
    all_at_once, _ = execute.run_kernels(*inputs, plan_of(case, **changes))
    assert torch.equal(out, all_at_once)


@pytest.mark.parametrize("lengths", [(1000, 3, 0, 257, 640), (64, 128, 129, 1000, 1)])
def test_parts_of_fixed_sizes_have_the_same_bits_whoever_computes_them(lengths: tuple[int, ...]) -> None:
    need_roles()
    case = Case(
        batch=len(lengths), capacity=1000, seqlens=lengths, heads_q=8, heads_kv=2, dtype=torch.bfloat16
    )
    inputs = make_inputs(case, device=DEVICE)
    fixed = plan_of(case, num_splits=8, split_tokens=256, leaf_tokens=128, runs=1)
    out, lse = execute.run_kernels(*inputs, fixed)
    assert_close_to_reference(out, lse, *inputs)
    by_leaf = dataclasses.replace(fixed, num_splits=16, by_leaf=True)
    others = [dataclasses.replace(plan, runs=runs) for plan in (fixed, by_leaf) for runs in (0, 2, 3, 7, 16)]
    for plan in others:
        out_other, lse_other = execute.run_kernels(*inputs, plan)
        assert torch.equal(out, out_other), plan
        assert torch.equal(lse, lse_other), plan
