"""Which plans there are to compile ahead, for calls of some heads and pages."""

from __future__ import annotations

import dataclasses
import itertools

from flash_decoding.plan import roles
from flash_decoding.plan.fixed import fixed_sizes, invariant_tiles
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.sharing import runs_tile
from flash_decoding.plan.tiles import tiles_for
from flash_decoding.spec import Plan, Problem


def plans_ahead(
    problem: Problem, hardware: Hardware, *, splits: tuple[int, ...], parts: tuple[int, ...]
) -> list[Plan]:
    """Plans that between them launch every kernel that a call with these heads, pages and options can.

    Args:
        problem: a small call; no length, batch or number of splits is compiled in.
        hardware: where it is to run.
        splits: numbers of them that are combined by kernels that differ, the fewest first.
        parts: the same of parts of a fixed size.
    """
    overlaps, with_roles = hardware.overlaps_launches, roles.suits(problem, hardware)
    tiles = [(tile, False) for tile in tiles_for(problem, hardware)]
    if with_roles:
        tiles += [(tile, True) for tile in roles.all_tiles(problem)]
    one = [Plan("flash_attention", "triton", tile, 1, 0, (), overlaps, roles=own) for tile, own in tiles]
    several = [
        dataclasses.replace(plan, kind="flash_decoding", num_splits=number)
        for plan, number in itertools.product(one, splits)
    ]
    tile = roles.runs_tile(problem) if with_roles else runs_tile(problem, hardware)
    shared = [
        Plan(
            "flash_decoding", "triton", tile, number * problem.batch, 0, (), overlaps, balanced=True,
            roles=with_roles,
        )
        for number in splits
    ]  # fmt: skip
    return [*one, *several, *shared, *_fixed_plans(problem, hardware, parts)]


def _fixed_plans(problem: Problem, hardware: Hardware, parts: tuple[int, ...]) -> list[Plan]:
    """Those of batch-invariant calls: one split or more, or leaves; with a program each, or shared."""
    overlaps, with_roles = hardware.overlaps_launches, roles.suits_any_batch(problem, hardware)
    if with_roles:
        each = shared = roles.runs_tile(problem)
    else:
        each, shared = invariant_tiles(problem, hardware)
    sizes = fixed_sizes(problem, each, with_roles=with_roles)
    one = Plan("flash_decoding", "triton", each, 1, overlap=overlaps, roles=with_roles, **sizes._asdict())
    plans = [one]
    for number in parts:
        plans.append(dataclasses.replace(one, num_splits=number))
        plans.append(dataclasses.replace(one, num_splits=number, runs=2, tile=shared))
    if sizes.leaf_tokens:
        tile = roles.runs_tile(problem, few_keys=True) if with_roles else each
        by_leaf = dataclasses.replace(one, tile=tile, num_splits=parts[0], by_leaf=True)
        plans += [by_leaf, dataclasses.replace(by_leaf, runs=2)] if with_roles else [by_leaf]
    return plans
