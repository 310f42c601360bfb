"""Which tile: rows of data, the first that applies is taken.

A row says up to how many packed rows, head_dim and bytes per element it holds. Where its shared memory
does not fit a GPU the pipeline is shortened, then the tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flash_decoding.plan.hardware import Hardware
from flash_decoding.spec import Problem, Tile, padded

ANY = 1 << 30


@dataclass(frozen=True)
class TileRow:
    """One line of the table: the tile, where it applies, and the record that measured it.

    ``crowded`` rows are for calls with two programs or more for every multiprocessor: shorter pipelines let
    several share one. They differ from the row below in stages alone, so that no result depends on the crowd.
    """

    max_rows: int
    max_head_dim: int
    element_bytes: int
    tile: Tile
    measured: str
    crowded: bool = False
    warpgroups: bool = False
    """Only where warpgroups multiply out of shared memory: registers last for larger tiles there."""


H200 = "results/tiles-h200.json"
UNMEASURED = "chosen by shared memory and registers; no record yet"

TILES = (
    # one tile of the matrix units' fewest rows: decoding
    TileRow(16, 64, 2, Tile(16, 128, 4, 2), H200, crowded=True),
    TileRow(16, 64, 2, Tile(16, 128, 4, 4), H200),
    TileRow(16, 128, 2, Tile(16, 64, 4, 2), H200, crowded=True),
    TileRow(16, 128, 2, Tile(16, 64, 4, 4), H200),
    TileRow(16, 256, 2, Tile(16, 64, 4, 3), H200),
    TileRow(32, 128, 2, Tile(32, 128, 4, 3), H200, warpgroups=True),
    TileRow(32, 128, 2, Tile(32, 64, 4, 4), UNMEASURED),
    TileRow(32, 256, 2, Tile(32, 32, 4, 4), UNMEASURED),
    # a few query tokens: speculative verification, short chunks
    TileRow(64, 128, 2, Tile(64, 64, 4, 4), H200, warpgroups=True),
    TileRow(64, 128, 2, Tile(64, 64, 4, 3), UNMEASURED),
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
    Hopper's do from 64 rows on.
    """
    columns, columns_v = padded(problem.head_dim), padded(problem.head_dim_v)
    buffers = max(1, tile.num_stages - int(tile.block_m < 64))
    stage = tile.block_n * (columns + columns_v)
    queries = tile.block_m * (columns + 2 * tile.block_n)
    return (buffers * stage + queries) * problem.element_bytes + PAGE_ENTRIES * tile.block_n


def choose_tile(problem: Problem, hardware: Hardware) -> Tile:
    """First row of the table that holds the problem, stepped down until it fits the GPU."""
    programs = row_tiles(problem, 16) * problem.heads_kv * problem.batch
    return _tile(problem, hardware, crowded=programs >= 2 * hardware.sm_count)


def roomy_tile(problem: Problem, hardware: Hardware) -> Tile:
    """The tile for a multiprocessor that is not crowded, whatever the batch."""
    return _tile(problem, hardware, crowded=False)


def residents(problem: Problem, tile: Tile, hardware: Hardware) -> int:
    """Programs that a multiprocessor holds at once, by their shared memory; 2 at most, which keep it busy."""
    return max(1, min(2, hardware.smem_bytes // smem_bytes(problem, tile)))


def tiles_for(problem: Problem, hardware: Hardware) -> tuple[Tile, ...]:
    """The tiles that a problem of these heads can get, whatever its batch: what there is to compile ahead."""
    return tuple({_tile(problem, hardware, crowded=crowded) for crowded in (False, True)})


def _tile(problem: Problem, hardware: Hardware, *, crowded: bool) -> Tile:
    head_dim = max(problem.head_dim, problem.head_dim_v)
    tile = next(
        row.tile
        for row in TILES
        if problem.rows <= row.max_rows
        and head_dim <= row.max_head_dim
        and problem.element_bytes == row.element_bytes
        and (hardware.multiplies_by_warpgroup or not row.warpgroups)
        and (crowded or not row.crowded)
    )
    while smem_bytes(problem, tile) > hardware.smem_bytes:
        tile = _smaller(tile)
    return tile


def row_tiles(problem: Problem, block_m: int) -> int:
    """Row tiles of one key/value head of one sequence."""
    return -(-problem.rows // block_m)


def _smaller(tile: Tile) -> Tile:
    if tile.num_stages > 2:
        return dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    if tile.block_n > 16:
        return dataclasses.replace(tile, block_n=tile.block_n // 2)
    return dataclasses.replace(tile, num_stages=1)
