"""Warps with roles in all that they can do, whether the planner asks for it or not, against the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_decoding import execute
from flash_decoding.plan import Hardware
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


CASES = [dataclasses.replace(case, dtype=torch.bfloat16) for case in EDGES if suits(case)]


def plan_of(case: Case, *, rows: int, **changes: int | bool) -> Plan:
    """A plan for warps with roles, of small tiles: parts have several."""
    keys = 64 if padded(max(case.head_dim, case.head_dim_v or 0)) <= 128 else 32
    overlaps = Hardware.of(DEVICE).overlaps_launches
    plan = Plan("flash_decoding", "triton", Tile(rows, keys, 4, 3), 1, 0, (), overlaps, roles=True)
    return dataclasses.replace(plan, **changes)  # type: ignore[arg-type]  # fields of both types


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {"num_splits": 1},
        {"num_splits": 3},
        {"num_splits": 3, "programs": 2},
        {"num_splits": 5, "balanced": True},
    ],
    ids=["whole", "splits", "one after another", "runs"],
)
@pytest.mark.parametrize("rows", [16, 64])
def test_edges(case: Case, changes: dict[str, int | bool], rows: int) -> None:
    if not Hardware.of(DEVICE).gives_warps_roles:
        pytest.skip("needs a Hopper GPU, and a Triton whose Gluon the kernels ran under")
    inputs = make_inputs(case, device=DEVICE)
    assert execute.problem_of(*inputs, return_lse=True).aligned
    out, lse = execute.run_kernels(*inputs, plan_of(case, rows=rows, **changes))
    assert_close_to_reference(out, lse, *inputs)
