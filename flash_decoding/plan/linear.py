"""How the linear kernel shares the rows of a weight among the multiprocessors."""

from __future__ import annotations

from collections.abc import Sequence


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
