"""States of batch-invariant calls in scratch: who computes one gives it the same bits of fp32.

Results are rounded to 16 bits, which hides nearly all that could differ in the last bit of a state.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flash_decoding import execute
from flash_decoding.spec import Plan
from tests.helpers import Case, Inputs, make_inputs
from tests.test_kernels_fixed import FEATURES, small_splits
from tests.test_roles_gpu import need_roles, plan_of

CASES = [dataclasses.replace(case, dtype=torch.float16) for case in FEATURES]
CASES += [Case(name="leaves", batch=3, capacity=900, seqlens=(900, 500, 65), dtype=torch.float16)]

STAGES = ((2, 0), (4, 0), (4, 2))
"""Buffers, and how many of them are loaded at once; 0: all."""


def states_of(inputs: Inputs, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """acc (tokens, heads, parts, columns) and (peak, total) of all parts; NaN where nobody wrote any."""
    made: list[Tensor] = []
    make = execute._new

    def remember(*args: object) -> Tensor:
        made.append(make(*args))  # type: ignore[arg-type]  # as they came
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(execute, "_new", remember)
        execute.run_kernels(*inputs, plan)
    acc, sums = (tensor for tensor in made if tensor.dim() == 4)
    return acc, sums


def assert_same_states(inputs: Inputs, plans: list[Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = (states_of(inputs, plan, monkeypatch) for plan in plans)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            both = ~(mine.isnan() | theirs.isnan())
            assert both.any()
            assert torch.equal(mine[both], theirs[both])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_write_the_states_of_programs_with_one_split(
    case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(case, device=device)
    plan = small_splits(inputs, tiles=2 if case.name == "leaves" else 1)
    assert_same_states(inputs, [plan, dataclasses.replace(plan, runs=3)], monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("by_leaf", [False, True], ids=["splits", "leaves"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_so_do_warps_with_roles(head_dim: int, by_leaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    need_roles()
    case = Case(batch=3, capacity=3000, seqlens=(3000, 1400, 65), head_dim=head_dim, dtype=torch.bfloat16)
    inputs = make_inputs(case, device=torch.device("cuda"))
    plan = plan_of(case, num_splits=16, split_tokens=256, leaf_tokens=128)
    tiles = [dataclasses.replace(plan.tile, num_stages=stages, in_flight=i) for stages, i in STAGES]
    if by_leaf:
        plan = dataclasses.replace(plan, num_splits=32, by_leaf=True)
    plans = [dataclasses.replace(plan, tile=tile, runs=runs) for tile in tiles for runs in (0, 1, 5)]
    assert_same_states(inputs, plans, monkeypatch)
