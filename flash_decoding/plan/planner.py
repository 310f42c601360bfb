"""From plain numbers to an immutable plan."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.splits import INVARIANT_SPLIT_TOKENS, choose_num_splits, tiles_in
from flash_decoding.plan.tiles import (
    choose_roles_tile,
    choose_tile,
    invariant_regime_of,
    regime_of,
    residents,
    row_tiles,
    suits_roles,
)
from flash_decoding.plan.variants import choose_variant
from flash_decoding.spec import Kind, Plan, Problem, Tile

INVARIANT_RAGGED_Q_LEN = 8
"""Query tokens that the tile of a ragged batch is chosen for in batch-invariant mode."""

BALANCED_MIN_BYTES = 128 << 20
"""Bytes of a full cache from which work is shared across sequences: below, finding one's share costs more."""

BALANCED_MIN_LEN = 8192
"""Keys of a full sequence from which it is: shorter ones cannot keep the others waiting for long."""

BALANCED_MAX_ROWS = 64
"""Packed query rows up to which it is: with more, arithmetic is what has to be shared."""

ROLES_REASON = "each program has a multiprocessor to itself: as many warps again load, these multiply"


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
    if num_splits == 0 and (runs := choose_runs(problem, hardware)) > 0:
        return _balanced_plan(problem, hardware, runs)
    return _split_plan(problem, hardware, num_splits)


def _split_plan(problem: Problem, hardware: Hardware, num_splits: int) -> Plan:
    """As many splits of each sequence as give every multiprocessor a program, or as many as asked for."""
    regime = regime_of(problem, hardware)
    roles = suits_roles(problem, hardware, regime)
    tile = choose_roles_tile(problem, regime) if roles else choose_tile(problem, hardware, regime)
    slots = hardware.sm_count * (residents(problem, tile, hardware) if problem.page_size else 1)
    tiles = visible_tiles(problem, tile)
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
    if num_splits > 0:
        splits = min(num_splits, tiles)
        reason = f"num_splits={num_splits} was asked for; the keys fill {tiles} tiles of {tile.block_n}"
    else:
        splits = choose_num_splits(programs=programs, tiles=tiles, slots=slots)
        reason = (
            f"{programs} programs without a split, {slots} wanted for {hardware.sm_count} multiprocessors, "
            f"{tiles} tiles of {tile.block_n} keys to share"
        )
    reasons = (reason, ROLES_REASON) if roles else (reason,)
    at_once = hardware.sm_count if roles and programs * splits > hardware.sm_count else 0
    overlaps = hardware.overlaps_launches
    return Plan(_kind(splits), "triton", tile, splits, 0, reasons, overlaps, roles=roles, programs=at_once)


def choose_runs(problem: Problem, hardware: Hardware) -> int:
    """Programs for each key/value head and row tile that share all keys; 0 where splits are better.

    All of them run at once: two on a multiprocessor, where their tile leaves room for a second.
    """
    if (
        problem.batch == 1
        or problem.dense
        or problem.rows > BALANCED_MAX_ROWS
        or problem.visible_len < BALANCED_MIN_LEN
        or problem.kv_bytes < BALANCED_MIN_BYTES
    ):
        return 0
    tile = runs_tile(problem, hardware)
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv
    runs = hardware.sm_count * residents(problem, tile, hardware) // programs
    return runs if runs > 1 else 0


def runs_tile(problem: Problem, hardware: Hardware) -> Tile:
    """The tile of programs that share all keys: large, but for pages, whose addresses take time to find."""
    return choose_tile(problem, hardware, "shared" if problem.page_size else "long")


def _balanced_plan(problem: Problem, hardware: Hardware, runs: int) -> Plan:
    """Programs that go across sequences: what they read does not depend on whose it is."""
    reason = (
        f"{problem.batch} sequences of up to {problem.kv_len} keys, of lengths that the device knows: "
        f"{runs} programs for each key/value head share all of them"
    )
    tile, overlaps = runs_tile(problem, hardware), hardware.overlaps_launches
    return Plan("flash_decoding", "triton", tile, runs, 0, (reason,), overlaps, balanced=True)


def visible_tiles(problem: Problem, tile: Tile) -> int:
    """Most tiles that a row tile can see; one more where a window or packed keys may begin inside a tile."""
    return tiles_in(problem.visible_len, tile.block_n) + int(problem.window_left >= 0 or problem.ragged)


def _kind(splits: int) -> Kind:
    return "flash_decoding" if splits > 1 else "flash_attention"


def _invariant_plan(problem: Problem, hardware: Hardware) -> Plan:
    """Fixed keys per split; and a tile that the longest query of a ragged batch cannot change."""
    longest = INVARIANT_RAGGED_Q_LEN if problem.ragged else problem.q_len
    problem_of_longest = dataclasses.replace(problem, q_len=longest)
    tile = choose_tile(problem_of_longest, hardware, invariant_regime_of(problem_of_longest, hardware))
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
