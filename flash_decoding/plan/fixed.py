"""Plans of batch-invariant calls: nothing that a sequence's neighbours change has a say in its bits."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from flash_decoding.invariant import (
    FEW_LEAVES,
    LEAF_TOKENS,
    LEAFY_SPLITS,
    MOST_SPLITS,
    SHORT_LEAF_TOKENS,
    SMALL_SPLIT_TOKENS,
    SMALL_SPLITS,
    SMALL_SPLITS_OF_FEW_ROWS,
    split_tokens,
)
from flash_decoding.plan import roles
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.sharing import choose_fixed_runs
from flash_decoding.plan.splits import kind_of, tiles_in, visible_tiles
from flash_decoding.plan.tiles import FEW_ROWS, Regime, choose_tile, invariant_regime_of, row_tiles
from flash_decoding.spec import Plan, Problem, Tile, padded

INVARIANT_RAGGED_Q_LEN = 8
"""Query tokens that the tile of a ragged batch is chosen for in batch-invariant mode."""

FP32_STAGES = 2
"""Stages of batch-invariant calls in fp32, at most: arithmetic is their bound."""

ENOUGH_PROGRAMS = 0.75
"""For each multiprocessor, from which fixed splits stay whole: leaves would be far more than run at once."""


def fixed_plan(problem: Problem, hardware: Hardware) -> Plan:
    """Fixed keys per split. Who reads a split may depend on the batch, but nothing that makes its bits."""
    with_roles = roles.suits_any_batch(_of_longest(problem), hardware)
    if with_roles:
        tile = tile_of_few = roles.runs_tile(problem)
    else:
        tile, tile_of_few = invariant_tiles(problem, hardware)
    sizes = fixed_sizes(problem, tile, with_roles=with_roles)
    splits = most_splits(visible_tiles(problem, tile), sizes, tile)
    reasons: tuple[str, ...] = (
        f"batch_invariant: splits have up to {sizes.split_tokens} keys, or a {MOST_SPLITS}th of their "
        "sequence's, whatever else is in the batch",
    )
    if sizes.small_split_tokens:
        most = sizes.small_split_tokens
        reasons += (f"up to {sizes.small_splits} splits of a sequence have up to {most} keys",)
    leaves = choose_leaves(problem, tile, splits, sizes, hardware)
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
        kind_of(parts), "triton", tile, parts, reasons=reasons, overlap=hardware.overlaps_launches,
        roles=with_roles, programs=at_once, by_leaf=leaves > 0, runs=runs, **sizes._asdict(),
    )  # fmt: skip


def _of_longest(problem: Problem) -> Problem:
    """The problem with the query tokens that batch-invariant calls reckon with."""
    return dataclasses.replace(problem, q_len=INVARIANT_RAGGED_Q_LEN) if problem.ragged else problem


class FixedSizes(NamedTuple):
    """Sizes of parts as a plan has them, under its names."""

    split_tokens: int
    small_split_tokens: int
    small_splits: int
    leaf_tokens: int


def fixed_sizes(problem: Problem, tile: Tile, *, with_roles: bool) -> FixedSizes:
    """Keys of splits and of leaves, in whole tiles; 0 where there are no small splits, or no leaves."""

    def whole(tokens: int) -> int:
        return max(1, tokens // tile.block_n) * tile.block_n

    split = whole(split_tokens(problem.heads_kv))
    wide = padded(max(problem.head_dim, problem.head_dim_v))
    if has_leaves(problem, tile, with_roles=with_roles):
        return FixedSizes(split, 0, 0, max(tile.block_n, LEAF_TOKENS * 128 // min(wide, 128)))
    small = whole(SMALL_SPLIT_TOKENS * 128 // max(wide, 128))
    has_few_rows = _of_longest(problem).rows <= FEW_ROWS
    most = SMALL_SPLITS_OF_FEW_ROWS if has_few_rows else SMALL_SPLITS
    return FixedSizes(split, min(split, small), most, 0)


def has_leaves(problem: Problem, tile: Tile, *, with_roles: bool) -> bool:
    """Whether splits are made of leaves: where registers have room for a split's state beside a leaf's.

    For wide heads they do where warps that multiply do nothing else.
    """
    widest = 256 if with_roles else 128
    return tile.block_m == FEW_ROWS and padded(problem.head_dim_v) <= widest and problem.element_bytes == 2


def most_splits(tiles: int, sizes: FixedSizes, tile: Tile) -> int:
    """Splits of a sequence of so many tiles: one, doubled as often as it takes, up to MOST_SPLITS."""
    splits = 1
    while splits < MOST_SPLITS:
        most = sizes.small_split_tokens if splits < sizes.small_splits else sizes.split_tokens
        if tiles * tile.block_n <= splits * most:
            break
        splits *= 2
    return splits


def choose_leaves(problem: Problem, tile: Tile, splits: int, sizes: FixedSizes, hardware: Hardware) -> int:
    """Most leaves of a sequence, where each is to have a program; 0 where splits give enough of them."""
    programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
    if not sizes.leaf_tokens or programs * splits >= ENOUGH_PROGRAMS * hardware.sm_count:
        return 0
    leaf, tokens = sizes.leaf_tokens, sizes.split_tokens
    short = max(tile.block_n, leaf * SHORT_LEAF_TOKENS // LEAF_TOKENS)
    seen = visible_tiles(problem, tile) * tile.block_n
    alone = [tiles_in(min(seen, tokens, FEW_LEAVES * size), size) for size in (short, 2 * short)]
    alone.append(tiles_in(min(seen, tokens), 4 * short))
    doubled = [2**i for i in range(1, LEAFY_SPLITS.bit_length()) if 2**i <= splits]
    of_several = [several * tiles_in(min(tokens, -(-seen // several)), leaf) for several in doubled]
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
