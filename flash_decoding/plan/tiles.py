"""Which tile: rows of data, the first that applies is taken.

A row says up to how many packed rows, head_dim and bytes per element it holds. Where its shared memory
does not fit a GPU the pipeline is shortened, then the tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from flash_decoding.plan.hardware import Hardware
from flash_decoding.spec import Problem, Tile, padded

ANY = 1 << 30

FEW_ROWS = 16
"""Rows of the smallest tile of the matrix units."""

Regime = Literal["long", "short", "shared", "crowded"]
"""How the programs of a call fall on the multiprocessors.

long: one each at most, for many keys: a tile that leaves room for no second one, since the programs of the
next call come early and would settle two by two.
short: one each at most, for few keys or of many rows: their ends weigh more than what the next call does.
shared: two or three each; and all that read pages, of which each waits for addresses now and then.
crowded: more.
"""

LONG_KEYS = 512
"""Keys of a program from which its regime is long."""

SHARED_BY = 3
"""Programs for each multiprocessor up to which the regime is shared."""

CROWDED_BY = 2
"""The same where no keys per tile but those of the short regime are allowed."""


@dataclass(frozen=True)
class TileRow:
    """One line of the table: the tile, where it applies, and the record that measured it.

    Rows without a regime hold for every one. The crowded row differs from the short one in stages alone:
    these two serve batch-invariant calls, whose results do not depend on the crowd.
    """

    max_rows: int
    max_head_dim: int
    element_bytes: int
    tile: Tile
    measured: str
    regime: Regime | None = None
    warpgroups: bool = False
    """Only where warpgroups multiply out of shared memory: registers last for larger tiles there."""


H200 = "results/tiles-h200.json"
IN_USE = "results/serving-nvidia-h200-bfloat16-20261130T065221Z.json"
TRIED = "the fastest of those tried side by side on an H200 (tools.compare); no record yet"
UNMEASURED = "chosen by shared memory and registers; no record yet"

TILES = (
    # one tile of the matrix units' fewest rows: decoding
    TileRow(16, 64, 2, Tile(16, 128, 4, 2), H200, "crowded"),
    TileRow(16, 64, 2, Tile(16, 64, 4, 4), IN_USE, "shared"),
    TileRow(16, 64, 2, Tile(16, 256, 4, 3), IN_USE, "long"),
    TileRow(16, 64, 2, Tile(16, 128, 4, 4), H200),
    TileRow(16, 128, 2, Tile(16, 64, 4, 2), H200, "crowded"),
    TileRow(16, 128, 2, Tile(16, 64, 4, 3), IN_USE, "shared"),
    TileRow(16, 128, 2, Tile(16, 128, 4, 3), IN_USE, "long"),
    TileRow(16, 128, 2, Tile(16, 64, 4, 4), H200),
    TileRow(16, 256, 2, Tile(16, 32, 4, 3), TRIED, "shared"),
    TileRow(16, 256, 2, Tile(16, 64, 4, 3), H200),
    # more heads, and a few query tokens: multi-query, speculative verification, short chunks
    TileRow(64, 128, 2, Tile(64, 64, 4, 4), IN_USE, "long", warpgroups=True),
    TileRow(32, 128, 2, Tile(64, 64, 4, 3), IN_USE, warpgroups=True),
    TileRow(32, 128, 2, Tile(32, 64, 4, 4), UNMEASURED),
    TileRow(32, 256, 2, Tile(32, 32, 4, 3), TRIED, "shared"),
    TileRow(32, 256, 2, Tile(64, 32, 4, 3), TRIED, warpgroups=True),
    TileRow(32, 256, 2, Tile(32, 32, 4, 4), UNMEASURED),
    TileRow(64, 128, 2, Tile(64, 64, 4, 3), IN_USE),
    TileRow(64, 256, 2, Tile(64, 32, 4, 3), UNMEASURED),
    # many query tokens: prefill
    TileRow(ANY, 64, 2, Tile(128, 64, 4, 3), H200),
    TileRow(ANY, 128, 2, Tile(64, 64, 4, 3), H200, warpgroups=True),
    TileRow(ANY, 128, 2, Tile(64, 64, 8, 3), UNMEASURED),
    TileRow(ANY, 256, 2, Tile(128, 32, 8, 3), H200, warpgroups=True),
    TileRow(ANY, 256, 2, Tile(64, 64, 8, 2), UNMEASURED),
    # fp32 goes through the ordinary arithmetic units, and its tiles through registers
    TileRow(ANY, 128, 4, Tile(16, 128, 8, 2), H200, warpgroups=True),
    TileRow(ANY, 128, 4, Tile(16, 32, 8, 3), UNMEASURED),
    TileRow(ANY, 256, 4, Tile(16, 16, 8, 2), UNMEASURED),
)


PAGE_ENTRIES = 4 * 4
"""Bytes per key for the table entries of a paged cache, in the pipeline before the pipeline."""


def smem_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of the attention kernel, as an upper bound: the pipeline and the queries.

    Of n stages one is in registers, unless the matrix units read their operands from shared memory, as
    Hopper's do from 64 rows on. Scores go through it where warps share rows, as they do below that.
    """
    columns, columns_v = padded(problem.head_dim), padded(problem.head_dim_v)
    share_rows = tile.block_m < 64
    buffers = max(1, tile.num_stages - int(share_rows))
    stage = tile.block_n * (columns + columns_v)
    queries = tile.block_m * (columns + 2 * tile.block_n * int(share_rows))
    return (buffers * stage + queries) * problem.element_bytes + PAGE_ENTRIES * tile.block_n


def regime_of(problem: Problem, hardware: Hardware) -> Regime:
    """How a call's programs fall on the multiprocessors, with as many splits as these have room for."""
    programs = row_tiles(problem, FEW_ROWS) * problem.heads_kv * problem.batch
    if problem.page_size:
        return "shared"
    if programs > SHARED_BY * hardware.sm_count:
        return "crowded"
    if programs > hardware.sm_count:
        return "shared"
    keys = problem.visible_len // (hardware.sm_count // programs)
    return "long" if keys >= LONG_KEYS and problem.rows <= FEW_ROWS else "short"


def invariant_regime_of(problem: Problem, hardware: Hardware) -> Regime:
    """The same for batch-invariant calls: a regime whose tiles have as many keys as the others'."""
    if problem.page_size:
        return "shared"
    programs = row_tiles(problem, FEW_ROWS) * problem.heads_kv * problem.batch
    return "crowded" if programs >= CROWDED_BY * hardware.sm_count else "short"


def residents(problem: Problem, tile: Tile, hardware: Hardware) -> int:
    """Programs that a multiprocessor holds at once, by their shared memory; 2 at most, which keep it busy."""
    return max(1, min(2, hardware.smem_bytes // smem_bytes(problem, tile)))


def tiles_for(problem: Problem, hardware: Hardware) -> tuple[Tile, ...]:
    """The tiles that a problem of these heads can get, whatever its batch: what there is to compile ahead."""
    regimes: tuple[Regime, ...] = get_args(Regime)
    return tuple(dict.fromkeys(choose_tile(problem, hardware, regime) for regime in regimes))


def choose_tile(problem: Problem, hardware: Hardware, regime: Regime) -> Tile:
    """First row of the table that holds the problem, stepped down until it fits the GPU."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    tile = next(
        row.tile
        for row in TILES
        if problem.rows <= row.max_rows
        and head_dim <= row.max_head_dim
        and problem.element_bytes == row.element_bytes
        and (hardware.multiplies_by_warpgroup or not row.warpgroups)
        and _suits(row, problem, hardware, regime)
    )
    while smem_bytes(problem, tile) > hardware.smem_bytes:
        tile = _smaller(tile)
    return tile


def _suits(row: TileRow, problem: Problem, hardware: Hardware, regime: Regime) -> bool:
    """Whether a row is for the regime; the long one only where a GPU has room for all of it."""
    if row.regime == "long" and smem_bytes(problem, row.tile) > hardware.smem_bytes:
        return False
    return row.regime in {None, regime}


def row_tiles(problem: Problem, block_m: int) -> int:
    """Row tiles of one key/value head of one sequence."""
    return -(-problem.rows // block_m)


def _smaller(tile: Tile) -> Tile:
    if tile.num_stages > 2:
        return dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    if tile.block_n > 16:
        return dataclasses.replace(tile, block_n=tile.block_n // 2)
    return dataclasses.replace(tile, num_stages=1)
