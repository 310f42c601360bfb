"""Work shared across sequences: where it pays, by how many programs, and with which tile."""

from __future__ import annotations

from flash_decoding.plan import roles
from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.tiles import FEW_ROWS, choose_tile, residents, row_tiles
from flash_decoding.spec import Problem, Tile

BALANCED_MIN_BYTES = 128 << 20
"""Bytes of a full cache from which work is shared across sequences: below, finding one's share costs more."""

BALANCED_MIN_LEN = 8192
"""Keys of a full sequence from which it is: shorter ones cannot keep the others waiting for long."""

BALANCED_MAX_ROWS = 64
"""Packed query rows up to which it is: with more, arithmetic is what has to be shared."""

FIXED_PROGRAMS = 64
"""For each multiprocessor, up to which every split of a fixed size has a program: even if most of them find
nothing to do, they cost less than sharing splits out."""


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
