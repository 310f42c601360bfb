"""Which tile: rows of data, the first that applies is taken.

A row says up to how many packed rows, head_dim and bytes per element it holds. Where its shared memory does not
fit a GPU the pipeline is shortened, then the tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flash_decoding.plan.hardware import Hardware
from flash_decoding.spec import Problem, Tile

ANY = 1 << 30


@dataclass(frozen=True)
class TileRow:
    """One line of the table: the tile, where it applies, and the record that measured it."""

    max_rows: int
    max_head_dim: int
    element_bytes: int
    tile: Tile
    measured: str


UNMEASURED = "chosen by shared memory and registers; no record yet"

TILES = (
    # rows of the matrix units' smallest tile: decoding
    TileRow(16, 64, 2, Tile(16, 128, 4, 4), UNMEASURED),
    TileRow(16, 128, 2, Tile(16, 64, 4, 4), UNMEASURED),
    TileRow(16, 256, 2, Tile(16, 32, 4, 4), UNMEASURED),
    TileRow(32, 128, 2, Tile(32, 64, 4, 4), UNMEASURED),
    TileRow(32, 256, 2, Tile(32, 32, 4, 4), UNMEASURED),
    # a few query tokens: speculative verification, short chunks
    TileRow(64, 128, 2, Tile(64, 64, 4, 3), UNMEASURED),
    TileRow(64, 256, 2, Tile(64, 32, 4, 3), UNMEASURED),
    # many query tokens: prefill
    TileRow(ANY, 64, 2, Tile(128, 64, 4, 3), UNMEASURED),
    TileRow(ANY, 128, 2, Tile(128, 64, 8, 3), UNMEASURED),
    TileRow(ANY, 256, 2, Tile(64, 64, 8, 2), UNMEASURED),
    # fp32 goes through the ordinary arithmetic units, and its tiles through registers
    TileRow(ANY, 64, 4, Tile(16, 32, 4, 2), UNMEASURED),
    TileRow(ANY, 128, 4, Tile(16, 32, 4, 2), UNMEASURED),
    TileRow(ANY, 256, 4, Tile(16, 16, 4, 2), UNMEASURED),
)


def padded(columns: int) -> int:
    """Columns as the kernels hold them: a power of two, 16 at least."""
    return max(16, 1 << (columns - 1).bit_length())


def smem_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of the attention kernel, as an upper bound: the pipeline of keys and values, and the queries."""
    columns, columns_v = padded(problem.head_dim), padded(problem.head_dim_v)
    stage = tile.block_n * (columns + columns_v)
    queries = tile.block_m * (columns + tile.block_n)
    return (tile.num_stages * stage + queries) * problem.element_bytes


def choose_tile(problem: Problem, hardware: Hardware) -> Tile:
    """First row of the table that holds the problem, stepped down until it fits the GPU."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    row = next(
        row
        for row in TILES
        if problem.rows <= row.max_rows
        and head_dim <= row.max_head_dim
        and problem.element_bytes == row.element_bytes
    )
    tile = row.tile
    while smem_bytes(problem, tile) > hardware.smem_bytes:
        tile = _smaller(tile)
    return tile


def _smaller(tile: Tile) -> Tile:
    if tile.num_stages > 2:
        return dataclasses.replace(tile, num_stages=tile.num_stages - 1)
    if tile.block_n > 16:
        return dataclasses.replace(tile, block_n=tile.block_n // 2)
    return dataclasses.replace(tile, num_stages=1)
