"""Which plans there are to compile ahead, for calls of some heads and pages."""

from __future__ import annotations

import dataclasses
import itertools

from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.planner import has_leaves, invariant_tiles, runs_tile
from flash_decoding.plan.tiles import tiles_for
from flash_decoding.spec import Plan, Problem


def plans_ahead(problem: Problem, hardware: Hardware, *, few: int, many: int) -> list[Plan]:
    """Plans that between them launch every kernel that a call with these heads, pages and options can.

    Args:
        problem: a small call; no length, batch or number of splits is compiled in.
        hardware: where it is to run.
        few: splits that are combined by one kernel.
        many: splits that are combined by another.
    """
    overlaps = hardware.overlaps_launches
    one = [
        Plan("flash_attention", "triton", tile, 1, 0, (), overlaps, roles=roles)
        for tile, roles in tiles_for(problem, hardware)
    ]
    several = [
        dataclasses.replace(plan, kind="flash_decoding", num_splits=splits)
        for plan, splits in itertools.product(one, (few, many))
    ]
    tile = runs_tile(problem, hardware)
    shared = Plan("flash_decoding", "triton", tile, few, 0, (), overlaps, balanced=True)
    return [*one, *several, shared, *_fixed_plans(problem, hardware)]


def _fixed_plans(problem: Problem, hardware: Hardware) -> list[Plan]:
    """Those of batch-invariant calls: splits, one of them or more, and runs that share them."""
    each, tile = invariant_tiles(problem, hardware)
    keys = tile.block_n  # of a split; its leaves are as large
    fixed = Plan(
        "flash_decoding", "triton", tile, 2, keys, (), hardware.overlaps_launches,
        leaf_tokens=keys if has_leaves(problem, tile) else 0,
    )  # fmt: skip
    splits = [dataclasses.replace(fixed, tile=tile, num_splits=n) for tile in {each, tile} for n in (1, 2)]
    return [*splits, dataclasses.replace(fixed, runs=2)]
