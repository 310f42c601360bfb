"""From plain numbers to an immutable plan."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from flash_decoding.invariant import (
    FEW_LEAVES,
    LEAF_TOKENS,
    LEAFY_SPLITS,
    MOST_SPLITS,
    SHORT_LEAF_TOKENS,
    SPLIT_TOKENS,
    split_tokens,
)
from flash_decoding.plan import roles
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.splits import choose_num_splits, tiles_in
from flash_decoding.plan.tiles import (
    FEW_ROWS,
    Regime,
    choose_tile,
    invariant_regime_of,
    regime_of,
    residents,
    row_tiles,
)
from flash_decoding.plan.variants import choose_variant
from flash_decoding.spec import Kind, Plan, Problem, Tile, padded

INVARIANT_RAGGED_Q_LEN = 8
"""Query tokens that the tile of a ragged batch is chosen for in batch-invariant mode."""

FP32_STAGES = 2
"""Stages of batch-invariant calls in fp32, at most: arithmetic is their bound."""

FIXED_PROGRAMS = 64
"""For each multiprocessor, up to which every split of a fixed size has a program: even if most of them find
nothing to do, they cost less than sharing splits out."""

ENOUGH_PROGRAMS = 0.75
"""For each multiprocessor, from which fixed splits stay whole: leaves would be far more than run at once."""

BALANCED_MIN_BYTES = 128 << 20
"""Bytes of a full cache from which work is shared across sequences: below, finding one's share costs more."""

BALANCED_MIN_LEN = 8192
"""Keys of a full sequence from which it is: shorter ones cannot keep the others waiting for long."""

BALANCED_MAX_ROWS = 64
"""Packed query rows up to which it is: with more, arithmetic is what has to be shared."""

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
        return _invariant_plan(problem, hardware)
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
    reasons = (reason, ROLES_REASON) if with_roles else (reason,)
    at_once = hardware.sm_count if with_roles and programs * splits > hardware.sm_count else 0
    overlaps = hardware.overlaps_launches
    return Plan(
        _kind(splits), "triton", tile, splits, 0, reasons, overlaps, roles=with_roles, programs=at_once
    )


def choose_runs(problem: Problem, hardware: Hardware) -> int:
    """Programs for each key/value head and row tile that share all keys; 0 where splits are better."""
    if problem.batch == 1 or problem.dense or not _is_worth_sharing(problem):
        return 0
    if roles.suits(problem, hardware):  # whose programs have a multiprocessor each
        return _if_several(hardware.sm_count // problem.heads_kv)
    return _runs_at_once(problem, runs_tile(problem, hardware), hardware)


def choose_fixed_runs(problem: Problem, tile: Tile, splits: int, hardware: Hardware) -> int:
    """The same that share splits of a fixed size; 0 where each has a program of its own.

    So it is where arithmetic is the bound.
    """
    is_arithmetic = tile.block_m > FEW_ROWS or problem.element_bytes > 2
    if splits == 1 or is_arithmetic or not _is_worth_sharing(problem):
        return 0
    programs = problem.batch * splits * row_tiles(problem, tile.block_m) * problem.heads_kv
    return _runs_at_once(problem, tile, hardware) if programs > FIXED_PROGRAMS * hardware.sm_count else 0


def _is_worth_sharing(problem: Problem) -> bool:
    """Whether there is more to gain by equal work than it takes to find one's share."""
    return (
        problem.rows <= BALANCED_MAX_ROWS
        and problem.visible_len >= BALANCED_MIN_LEN
        and problem.kv_bytes >= BALANCED_MIN_BYTES
    )


def _runs_at_once(problem: Problem, tile: Tile, hardware: Hardware) -> int:
    """Programs for each key/value head and row tile that run at once; 0 where that is no more than one.

    Two on a multiprocessor, where their tile leaves room for a second.
    """
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv
    return _if_several(hardware.sm_count * residents(problem, tile, hardware) // programs)


def _if_several(runs: int) -> int:
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
    with_roles = roles.suits(problem, hardware)
    tile = roles.runs_tile(problem) if with_roles else runs_tile(problem, hardware)
    reasons = (reason, ROLES_REASON) if with_roles else (reason,)
    overlaps = hardware.overlaps_launches
    return Plan("flash_decoding", "triton", tile, runs, 0, reasons, overlaps, balanced=True, roles=with_roles)


def visible_tiles(problem: Problem, tile: Tile) -> int:
    """Most tiles that a row tile can see; one more where a window or packed keys may begin inside a tile."""
    return tiles_in(problem.visible_len, tile.block_n) + int(problem.window_left >= 0 or problem.ragged)


def _kind(splits: int) -> Kind:
    return "flash_decoding" if splits > 1 else "flash_attention"


def _invariant_plan(problem: Problem, hardware: Hardware) -> Plan:
    """Fixed keys per split. Who reads a split may depend on the batch, but nothing that makes its bits."""
    with_roles = roles.suits_any_batch(_of_longest(problem), hardware)
    if with_roles:
        tile = tile_of_few = roles.runs_tile(problem)
    else:
        tile, tile_of_few = invariant_tiles(problem, hardware)
    tokens, leaf_tokens = fixed_tokens(problem, tile)
    splits = most_splits(visible_tiles(problem, tile), tokens // tile.block_n)
    reasons: tuple[str, ...] = (
        f"batch_invariant: splits have up to {tokens} keys, or a {MOST_SPLITS}th of their sequence's, "
        "whatever else is in the batch",
    )
    leaves = choose_leaves(problem, tile, splits, hardware)
    parts = leaves or splits
    whole = problem.heads_kv * problem.batch
    if with_roles:
        is_one_each = whole * parts <= hardware.sm_count
        runs = 0 if parts == 1 or is_one_each else hardware.sm_count // problem.heads_kv
    else:
        runs = choose_fixed_runs(problem, tile_of_few, splits, hardware)
    if with_roles and leaves:
        tile = roles.runs_tile(problem, few_keys=True)
    if runs and not leaves:
        tile = tile_of_few
        reasons += (f"{runs} programs for each key/value head share all splits",)
    elif leaves:
        reasons += (f"too few programs: up to {leaves} parts of splits of each sequence have one",)
    at_once = hardware.sm_count if with_roles and not runs and whole > hardware.sm_count else 0
    return Plan(
        _kind(parts), "triton", tile, parts, tokens, reasons, hardware.overlaps_launches, roles=with_roles,
        programs=at_once, leaf_tokens=leaf_tokens, by_leaf=leaves > 0, runs=runs,
    )  # fmt: skip


def _of_longest(problem: Problem) -> Problem:
    """The problem with the query tokens that batch-invariant calls reckon with."""
    return dataclasses.replace(problem, q_len=INVARIANT_RAGGED_Q_LEN) if problem.ragged else problem


def fixed_tokens(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Keys of a split and of a leaf of it, in whole tiles; 0 where splits have no leaves. These have as many
    bytes for every head_dim.
    """
    tokens = max(1, split_tokens(problem.heads_kv) // tile.block_n) * tile.block_n
    wide = padded(max(problem.head_dim, problem.head_dim_v))
    leaf = max(tile.block_n, LEAF_TOKENS * 128 // wide)
    return tokens, leaf if has_leaves(problem, tile) else 0


def has_leaves(problem: Problem, tile: Tile) -> bool:
    """Whether splits are made of leaves: where registers have room for a split's state beside a leaf's."""
    return tile.block_m == FEW_ROWS and padded(problem.head_dim_v) <= 128 and problem.element_bytes == 2


def most_splits(tiles: int, split_tiles: int) -> int:
    """Splits of a sequence of so many tiles: one, doubled as often as it takes, up to MOST_SPLITS."""
    return min(MOST_SPLITS, 1 << max(0, -(-tiles // split_tiles) - 1).bit_length())


def choose_leaves(problem: Problem, tile: Tile, splits: int, hardware: Hardware) -> int:
    """Most leaves of a sequence, where each is to have a program; 0 where splits give enough of them."""
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
    if programs * splits >= ENOUGH_PROGRAMS * hardware.sm_count or not has_leaves(problem, tile):
        return 0
    tokens, leaf_tokens = fixed_tokens(problem, tile)
    short = max(tile.block_n, SHORT_LEAF_TOKENS)
    seen = visible_tiles(problem, tile) * tile.block_n
    alone = [tiles_in(min(seen, tokens, FEW_LEAVES * leaf), leaf) for leaf in (short, 2 * short, 4 * short)]
    doubled = [2**i for i in range(1, LEAFY_SPLITS.bit_length()) if 2**i <= splits]
    of_several = [several * tiles_in(min(tokens, -(-seen // several)), leaf_tokens) for several in doubled]
    leaves = max(*alone, *of_several, splits)
    return leaves if leaves > splits else 0


def invariant_tiles(problem: Problem, hardware: Hardware) -> tuple[Tile, Tile]:
    """Tiles of batch-invariant calls: where each split has a program, and where programs share them.

    They differ in stages alone: a few programs on a multiprocessor need more than a crowd. The longest query
    of a ragged batch cannot change them.
    """
    problem = _of_longest(problem)
    few: Regime = "shared" if problem.page_size else "short"
    many = invariant_regime_of(problem, hardware)
    each, shared = choose_tile(problem, hardware, many), choose_tile(problem, hardware, few)
    if problem.element_bytes == 4:
        each, shared = (
            dataclasses.replace(tile, num_stages=min(tile.num_stages, FP32_STAGES)) for tile in (each, shared)
        )
    return each, shared


def _cpu_plan(*, num_splits: int, batch_invariant: bool) -> Plan:
    tokens = SPLIT_TOKENS if batch_invariant else 0
    reason = "on a CPU the keys are computed in parts, as its threads and caches want them"
    kind: Kind = "flash_attention" if num_splits == 1 else "flash_decoding"
    return Plan(kind, "cpu", Tile(0, 0, 0, 0), num_splits, tokens, (reason,))
