"""From plain numbers to an immutable plan."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.splits import INVARIANT_SPLIT_TOKENS, choose_num_splits, tiles_in
from flash_decoding.plan.tiles import choose_tile, row_tiles
from flash_decoding.plan.variants import choose_variant
from flash_decoding.spec import Kind, Plan, Problem, Tile

INVARIANT_RAGGED_Q_LEN = 8
"""Query tokens that the tile of a ragged batch is chosen for in batch-invariant mode."""


@lru_cache(maxsize=4096)
def make_plan(
    problem: Problem, hardware: Hardware, *, num_splits: int = 0, batch_invariant: bool = False
) -> Plan:
    """Decide what runs a problem on some hardware.

    Args:
        problem: the call in plain numbers.
        hardware: where it is to run; any, whether this machine has it or not.
        num_splits: 0 leaves the number to the planner; otherwise it is kept, up to one split per tile.
        batch_invariant: fix the keys per split, so that a sequence's result does not depend on the batch.

    Raises:
        Unsupported: nothing here runs the problem on this hardware.
    """
    variant = choose_variant(problem, hardware, needs_splits=num_splits > 1 or batch_invariant)
    if variant.name == "sdpa":
        reason = f"{problem.rows} query rows per key/value head over dense keys: bound by arithmetic"
        return Plan("flash_attention", "sdpa", Tile(0, 0, 0, 0), 1, 0, (reason,))
    if variant.name == "cpu":
        return _cpu_plan(num_splits=num_splits, batch_invariant=batch_invariant)
    if batch_invariant:
        return _invariant_plan(problem, hardware)
    tile = choose_tile(problem, hardware)
    tiles = visible_tiles(problem, tile)
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
    if num_splits > 0:
        splits = min(num_splits, tiles)
        reason = f"num_splits={num_splits} was asked for; the keys fill {tiles} tiles of {tile.block_n}"
    else:
        splits = choose_num_splits(programs=programs, tiles=tiles, slots=hardware.sm_count)
        reason = (
            f"{programs} programs without a split for {hardware.sm_count} multiprocessors, "
            f"{tiles} tiles of {tile.block_n} keys to share"
        )
    return Plan(_kind(splits), "triton", tile, splits, 0, (reason,), hardware.overlaps_launches)


def visible_tiles(problem: Problem, tile: Tile) -> int:
    """Most tiles that a row tile can see; one more where a window may begin inside a tile."""
    return tiles_in(problem.visible_len, tile.block_n) + int(problem.window_left >= 0)


def _kind(splits: int) -> Kind:
    return "flash_decoding" if splits > 1 else "flash_attention"


def _invariant_plan(problem: Problem, hardware: Hardware) -> Plan:
    """Fixed keys per split; and a tile that the longest query of a ragged batch cannot change."""
    longest = INVARIANT_RAGGED_Q_LEN if problem.ragged else problem.q_len
    tile = choose_tile(dataclasses.replace(problem, q_len=longest), hardware)
    per_split = max(1, INVARIANT_SPLIT_TOKENS // tile.block_n)
    splits = -(-visible_tiles(problem, tile) // per_split)
    reason = (
        f"batch_invariant: every split has {per_split * tile.block_n} keys, whatever else is in the batch"
    )
    tokens = per_split * tile.block_n
    return Plan(_kind(splits), "triton", tile, splits, tokens, (reason,), hardware.overlaps_launches)


def _cpu_plan(*, num_splits: int, batch_invariant: bool) -> Plan:
    tokens = INVARIANT_SPLIT_TOKENS if batch_invariant else 0
    reason = "on a CPU the keys are computed in parts, as its threads and caches want them"
    kind: Kind = "flash_attention" if num_splits == 1 else "flash_decoding"
    return Plan(kind, "cpu", Tile(0, 0, 0, 0), num_splits, tokens, (reason,))
