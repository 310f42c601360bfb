"""Plans of batch-invariant calls, without a GPU."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_decoding.invariant import MOST_SPLITS, split_tokens
from flash_decoding.plan import Hardware, invariant_tiles, make_plan
from flash_decoding.spec import Plan, Problem
from tests.plan_cases import GPUS, H200, WITHOUT_ROLES, problems


@given(problems(), GPUS, st.integers(1, 512))
def test_batch_invariant_plans_split_alike_for_every_batch(
    problem: Problem, hardware: Hardware, batch: int
) -> None:
    def essence(plan: Plan) -> tuple[int, ...]:
        tile = plan.tile
        sizes = (
            plan.split_tokens,
            plan.small_split_tokens,
            plan.small_splits,
            plan.leaf_tokens,
            tile.block_m,
            tile.block_n,
            tile.num_warps,
        )
        return *sizes, plan.roles  # whose products have bits of their own

    other = Problem(**{**problem.__dict__, "batch": batch})
    plan = make_plan(problem, hardware, batch_invariant=True)
    assert essence(plan) == essence(make_plan(other, hardware, batch_invariant=True))
    assert plan.split_tokens * plan.num_splits >= min(problem.visible_len, plan.split_tokens)
    assert plan.split_tokens == max(split_tokens(problem.heads_kv), plan.tile.block_n)
    assert plan.by_leaf or plan.num_splits <= MOST_SPLITS


@pytest.mark.parametrize(
    ("batch", "kv_len", "q_len", "runs"),
    [
        (64, 131072, 1, 33),
        (512, 8192, 1, 33),
        (1, 2**20, 1, 0),  # a program for each split, a sixth of which has to wait
        (1, 32768, 1, 0),  # 32 splits for each head: all of them run at once
        (512, 1024, 1, 0),  # one split for each sequence
        (64, 4096, 1, 0),
        (1, 2**20, 128, 0),  # arithmetic is what has to be shared
    ],
)
def test_fixed_splits_are_shared_where_they_are_more_than_run_at_once(
    batch: int, kv_len: int, q_len: int, runs: int
) -> None:
    problem = Problem(batch, q_len, 32, 8, 128, 128, kv_len, 2)
    plan = make_plan(problem, WITHOUT_ROLES, batch_invariant=True)
    assert plan.runs == runs
    assert not plan.balanced
    if runs:
        assert runs * 8 <= 2 * H200.sm_count


@given(problems(), GPUS)
def test_tiles_of_batch_invariant_calls_differ_in_stages_alone(problem: Problem, hardware: Hardware) -> None:
    each, shared = invariant_tiles(problem, hardware)
    assert shared == dataclasses.replace(each, num_stages=shared.num_stages)


def test_packed_keys_may_begin_inside_a_tile() -> None:
    """As many as a split has reach into a second one then, and nothing of them may be lost."""
    plan = make_plan(Problem(2, 1, 8, 2, 64, 64, 1024, 2, ragged=True), H200, batch_invariant=True)
    assert plan.split_tokens == plan.small_split_tokens == 1024
    assert plan.num_splits == 2


@pytest.mark.parametrize(
    ("q_len", "head_dim", "kv_len", "splits"),
    [(4, 128, 1024, 1), (4, 128, 4096, 4), (8, 128, 20000, 8), (1, 256, 4096, 8), (1, 256, 20000, 16)],
)
def test_few_batch_invariant_splits_without_leaves_are_small(
    q_len: int, head_dim: int, kv_len: int, splits: int
) -> None:
    """Of 1024 keys at most, or of as many bytes; larger where there are many splits, of many rows sooner."""
    problem = Problem(1, q_len, 64, 8, head_dim, head_dim, kv_len, 2)
    plan = make_plan(problem, WITHOUT_ROLES, batch_invariant=True)
    assert plan.num_splits == splits
    assert plan.leaf_tokens == 0


def test_wide_heads_have_leaves_where_warps_have_roles() -> None:
    problem = Problem(1, 1, 16, 8, 256, 256, 4096, 2)
    plan = make_plan(problem, H200, batch_invariant=True)
    assert plan.by_leaf
    assert plan.leaf_tokens == 256
    assert make_plan(problem, WITHOUT_ROLES, batch_invariant=True).small_split_tokens == 512


@pytest.mark.parametrize(
    ("heads_kv", "kv_len", "splits"),
    [(2, 1024, 1), (2, 20000, 32), (8, 2560, 1), (8, 20000, 8), (8, 21000, 16), (8, 2**20, 128)],
)
def test_batch_invariant_splits_are_a_power_of_two(heads_kv: int, kv_len: int, splits: int) -> None:
    """Of 1024 keys at most, of 2560 where there are many heads, and never more than 128."""
    plan = make_plan(Problem(64, 1, 32, heads_kv, 128, 128, kv_len, 2), H200, batch_invariant=True)
    assert plan.num_splits == splits
    assert not plan.by_leaf


@pytest.mark.parametrize(
    ("batch", "kv_len", "leaves"), [(1, 4096, 16), (1, 512, 8), (1, 256, 4), (64, 1024, 0), (1, 2**17, 0)]
)
def test_leaves_have_programs_where_splits_are_too_few(batch: int, kv_len: int, leaves: int) -> None:
    problem = Problem(batch, 1, 32, 8, 128, 128, kv_len, 2)
    plan = make_plan(problem, WITHOUT_ROLES, batch_invariant=True)
    assert plan.by_leaf == (leaves > 0)
    assert plan.num_splits == leaves or not plan.by_leaf
    assert not (plan.by_leaf and plan.runs)


@pytest.mark.parametrize(
    ("batch", "kv_len", "runs"), [(1, 256, 0), (1, 4096, 0), (2, 4096, 16), (64, 131072, 16), (512, 1024, 0)]
)
def test_warps_with_roles_share_parts_of_fixed_sizes_where_there_are_more_than_programs(
    batch: int, kv_len: int, runs: int
) -> None:
    plan = make_plan(Problem(batch, 1, 32, 8, 128, 128, kv_len, 2), H200, batch_invariant=True)
    assert plan.roles
    assert plan.runs == runs
    assert plan.runs <= batch * plan.num_splits
    assert (plan.programs == 132) == (runs == 0 and 8 * batch * plan.num_splits > 132)


@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("kv_len", [2**17, 2**20])
def test_long_sequences_have_no_programs_for_leaves(heads_kv: int, kv_len: int) -> None:
    """128 splits are nearly as many as an H200 has multiprocessors; their leaves would be thousands."""
    plan = make_plan(Problem(1, 1, 8, heads_kv, 128, 128, kv_len, 2), H200, batch_invariant=True)
    assert plan.num_splits == MOST_SPLITS
    assert not plan.by_leaf
