"""From plain numbers to an immutable plan."""

from __future__ import annotations

from functools import lru_cache

from flash_decoding.invariant import SPLIT_TOKENS
from flash_decoding.plan import roles
from flash_decoding.plan.fixed import fixed_plan
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.sharing import choose_runs, runs_tile
from flash_decoding.plan.splits import choose_num_splits, kind_of, visible_tiles
from flash_decoding.plan.tiles import FEW_ROWS, choose_tile, regime_of, residents, row_tiles
from flash_decoding.plan.variants import choose_variant
from flash_decoding.spec import Kind, Plan, Problem, Tile

SECOND_PROGRAM_TILES = 10
"""Tiles of many rows from which a second program on a multiprocessor pays, each of both having so many: with
fewer the states that it adds cost more than it gains."""

ROLES_REASON = "each program has a multiprocessor to itself: some of its warps only load, the others multiply"


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
        return fixed_plan(problem, hardware)
    if num_splits == 0 and (runs := choose_runs(problem, hardware)) > 0:
        return _balanced_plan(problem, hardware, runs)
    return _split_plan(problem, hardware, num_splits)


def _split_plan(problem: Problem, hardware: Hardware, num_splits: int) -> Plan:
    """As many splits of each sequence as give every multiprocessor a program, or as many as asked for."""
    with_roles = roles.suits(problem, hardware)
    if with_roles:
        whole = problem.heads_kv * problem.batch
        tile = roles.split_tile(problem, num_splits or max(1, hardware.sm_count // whole))
    else:
        tile = choose_tile(problem, hardware, regime_of(problem, hardware))
    tiles = visible_tiles(problem, tile)
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
    slots = _slots(problem, tile, programs * tiles, hardware)
    if num_splits > 0:
        splits = min(num_splits, tiles)
        reason = f"num_splits={num_splits} was asked for; the keys fill {tiles} tiles of {tile.block_n}"
    else:
        splits = choose_num_splits(programs=programs, tiles=tiles, slots=slots)
        reason = (
            f"{programs} programs without a split, {slots} wanted for {hardware.sm_count} multiprocessors, "
            f"{tiles} tiles of {tile.block_n} keys to share"
        )
    reasons = (reason, ROLES_REASON) if with_roles else (reason,)
    at_once = hardware.sm_count if with_roles and programs * splits > hardware.sm_count else 0
    overlaps = hardware.overlaps_launches
    return Plan(
        kind_of(splits), "triton", tile, splits, 0, reasons, overlaps, roles=with_roles, programs=at_once
    )


def _slots(problem: Problem, tile: Tile, tiles: int, hardware: Hardware) -> int:
    """Programs wanted for so many tiles: one for each multiprocessor, two over pages if that pays."""
    if not problem.page_size:
        return hardware.sm_count
    slots = hardware.sm_count * residents(problem, tile, hardware)
    is_worth_it = problem.rows <= FEW_ROWS or tiles >= SECOND_PROGRAM_TILES * slots
    return slots if is_worth_it else hardware.sm_count


def _balanced_plan(problem: Problem, hardware: Hardware, runs: int) -> Plan:
    """Programs that go across sequences: what they read does not depend on whose it is."""
    reason = (
        f"{problem.batch} sequences of up to {problem.kv_len} keys, of lengths that the device knows: "
        f"{runs} programs for each key/value head share all of them"
    )
    with_roles = roles.suits(problem, hardware)
    tile = roles.runs_tile(problem) if with_roles else runs_tile(problem, hardware)
    reasons = (reason, ROLES_REASON) if with_roles else (reason,)
    overlaps = hardware.overlaps_launches
    return Plan("flash_decoding", "triton", tile, runs, 0, reasons, overlaps, balanced=True, roles=with_roles)


def _cpu_plan(*, num_splits: int, batch_invariant: bool) -> Plan:
    tokens = SPLIT_TOKENS if batch_invariant else 0
    reason = "on a CPU the keys are computed in parts, as its threads and caches want them"
    kind: Kind = "flash_attention" if num_splits == 1 else "flash_decoding"
    return Plan(kind, "cpu", Tile(0, 0, 0, 0), num_splits, tokens, (reason,))
