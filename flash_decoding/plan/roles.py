"""Which calls go to the kernels of warps with roles, and with which tile.

What counts is how much a multiprocessor asks of the memory at once. Loaders keep it at what their buffers
hold, about 64 KiB for keys and values together: with more, some programs get their keys late and the rest
wait for them. So there is one program on a multiprocessor, which takes one part after another where there
are more.
"""

from __future__ import annotations

import dataclasses

from flash_decoding.plan.hardware import Hardware
from flash_decoding.plan.tiles import FEW_ROWS
from flash_decoding.spec import Problem, Tile, padded

LARGE = Tile(FEW_ROWS, 128, 4, 2, in_flight=1)
"""Where programs have many keys, or whole sequences, and heads are not wide. Stages are buffers, of keys and
of values each, and one of these is loaded while the other is in use; tiles are for head_dim 128."""

SMALL = Tile(FEW_ROWS, 64, 4, 2)
"""Where programs share sequences: smaller tiles are shared more evenly."""

ALL_AT_ONCE = Tile(FEW_ROWS, 64, 4, 4)
"""Where a program has few keys."""

MANY_KEYS = 6144
"""Keys of a program from which it does not matter how evenly tiles are shared."""

FEW_KEYS = 512
"""Keys of a split below which it has few; of a sequence up to which going over to the next takes as long."""

MOST_PARTS = 8
"""Sequences of few keys that a program takes one after another. With more a crowd of portable programs is
faster."""

MAX_HEAD_DIM = 256


def suits(problem: Problem, hardware: Hardware) -> bool:
    """Whether a call can go to them, and is better off there than with the portable kernels."""
    sequences = problem.heads_kv * problem.batch
    is_crowd = problem.visible_len <= FEW_KEYS and sequences > MOST_PARTS * hardware.sm_count
    return suits_any_batch(problem, hardware) and not is_crowd


def suits_any_batch(problem: Problem, hardware: Hardware) -> bool:
    """Whether a call can go to them, by nothing that another batch could change."""
    return (
        hardware.gives_warps_roles
        and problem.element_bytes == 2
        and problem.page_size == 0
        and problem.rows <= FEW_ROWS
        and max(problem.head_dim, problem.head_dim_v) <= MAX_HEAD_DIM
        and problem.aligned
        and not problem.masked
    )


def split_tile(problem: Problem, splits: int) -> Tile:
    """The tile of about so many even splits, or of whole sequences."""
    keys = problem.visible_len // splits
    if problem.plain and not _is_wide(problem) and (splits == 1 or keys >= MANY_KEYS):
        return _for_head_dim(LARGE, problem)
    return _for_head_dim(SMALL if keys >= FEW_KEYS else ALL_AT_ONCE, problem)


def runs_tile(problem: Problem, *, few_keys: bool = False) -> Tile:
    """The tile of programs that share all keys: of as many keys for every batch and length."""
    return _for_head_dim(ALL_AT_ONCE if few_keys else SMALL, problem)


def all_tiles(problem: Problem) -> tuple[Tile, ...]:
    """Every tile that calls of these heads can get."""
    tiles = (SMALL, ALL_AT_ONCE) if _is_wide(problem) else (SMALL, LARGE, ALL_AT_ONCE)
    return tuple(dict.fromkeys(_for_head_dim(tile, problem) for tile in tiles))


def _is_wide(problem: Problem) -> bool:
    return max(problem.head_dim, problem.head_dim_v) > 128


def _for_head_dim(tile: Tile, problem: Problem) -> Tile:
    """As many bytes for every head_dim, 256 keys at most."""
    keys = tile.block_n * 128 // padded(max(problem.head_dim, problem.head_dim_v))
    return dataclasses.replace(tile, block_n=min(keys, 256))
