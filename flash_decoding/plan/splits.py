"""How many splits: the idea of Flash-Decoding in one page.

Without a split, a call has one program per (sequence, key/value head, row tile): a handful when decoding,
and a GPU has a hundred multiprocessors. So the keys are split until every multiprocessor has a program,
and no further: each split costs a partial result, written once and read once by the reduction.
"""

from __future__ import annotations

from flash_decoding.spec import Kind, Problem, Tile

MAX_SPLITS = 256
"""More splits than this make the reduction longer than what they save."""


def tiles_in(tokens: int, block_n: int) -> int:
    """Tiles of ``block_n`` keys that cover ``tokens`` keys; one at least."""
    return max(1, -(-tokens // block_n))


def choose_num_splits(*, programs: int, tiles: int, slots: int) -> int:
    """Splits that give every slot of the GPU a program, never more than there are tiles.

    Args:
        programs: programs without a split: row tiles x key/value heads x sequences.
        tiles: tiles of keys of the longest sequence.
        slots: programs that the GPU runs at once.
    """
    return max(1, min(slots // programs, tiles, MAX_SPLITS))


def visible_tiles(problem: Problem, tile: Tile) -> int:
    """Most tiles that a row tile can see; one more where a window or packed keys may begin inside a tile."""
    return tiles_in(problem.visible_len, tile.block_n) + int(problem.window_left >= 0 or problem.ragged)


def kind_of(splits: int) -> Kind:
    """What a call with so many splits is named."""
    return "flash_decoding" if splits > 1 else "flash_attention"
