"""How the linear kernel goes over the weights of a layer: rows of data, and one division."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from flash_decoding.plan.hardware import Hardware
from flash_decoding.projection import LinearTile
from flash_decoding.spec import padded

MAX_TOKENS = 16
"""Tokens that ride along for nothing: what the matrix units multiply with a weight at least."""

MAX_STEP = 128
"""Most rows of a weight that a program takes."""

MIN_STEP = 8

H200 = "results/linear-h200.json"


@dataclass(frozen=True)
class LinearRow:
    """One line of the table: a pipeline, for programs of up to ``max_step`` rows."""

    max_step: int
    gated: bool
    block_k: int
    num_warps: int
    num_stages: int
    measured: str


ROWS = (
    LinearRow(32, False, 256, 4, 6, H200),
    LinearRow(64, False, 256, 4, 4, H200),
    LinearRow(128, False, 128, 8, 4, H200),
    LinearRow(32, True, 128, 4, 6, H200),
    LinearRow(64, True, 128, 8, 3, H200),
    LinearRow(128, True, 128, 8, 3, H200),
)


@lru_cache(maxsize=256)
def choose_linear_tile(rows: tuple[int, ...], hardware: Hardware, *, gated: bool) -> LinearTile:
    """The rows of a program, and the first pipeline of the table that holds them, shortened until it fits.

    Args:
        rows: rows of each weight; of a gated pair those of one.
        hardware: where it is to run.
        gated: two weights are read side by side.
    """
    waves = 1
    while (step := even_step(rows, hardware.sm_count * waves)) > MAX_STEP:
        waves += 1
    step = max(MIN_STEP, step)
    row = next(row for row in ROWS if step <= row.max_step and row.gated == gated)
    block_n = padded(step)
    stages, block_k = row.num_stages, row.block_k
    while smem_bytes(block_n, block_k, stages, gated=gated) > hardware.smem_bytes:
        if stages > 2:
            stages -= 1
        else:
            block_k //= 2
    return LinearTile(step, block_n, block_k, row.num_warps, stages)


def smem_bytes(block_n: int, block_k: int, stages: int, *, gated: bool) -> int:
    """Shared memory of the pipeline: tiles of weights and tokens of 16 bits, with one stage to spare."""
    return 2 * block_k * (block_n * (2 if gated else 1) + MAX_TOKENS) * stages


def even_step(rows: Sequence[int], programs: int) -> int:
    """Fewest rows per program with which no more than ``programs`` cover all weights.

    A last wave that fills a tenth of the GPU costs as much as a full one. So programs take as many rows as
    make whole waves, not as many as the matrix units take at once.

    Args:
        rows: rows of each weight; a program has rows of one of them.
        programs: waves times multiprocessors; at least one for each weight.
    """
    step = max(1, -(-sum(rows) // programs))
    while sum(-(-height // step) for height in rows) > programs:
        step += 1
    return step
