"""What lengths, indices and page numbers have to hold. Checking mode only: this copies them to the host."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from flash_decoding import settings
from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache


def wanted(x: Tensor) -> bool:
    """True where contents are to be checked: in checking mode, with real tensors, outside graph capture."""
    if not settings.is_checking() or torch.compiler.is_compiling():
        return False
    if type(x) not in (Tensor, torch.nn.Parameter):
        return False  # fake and functional tensors have no contents
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def offsets(name: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    """Check where the sequences of a packed tensor start: from 0 to ``total``, none beyond ``longest``."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise InvalidInput(name, f"{starts[0]} ... {starts[-1]}", f"0 ... {total}: it covers every token")
    for b, (start, stop) in enumerate(itertools.pairwise(starts)):
        if not 0 <= stop - start <= longest:
            raise InvalidInput(name, f"length {stop - start} of sequence {b}", f"0 to {longest}")


def cache(checked: KVCache, *, written_only: bool = False) -> None:
    """Check lengths, padding, rows and page numbers of a cache whose shapes are right.

    Args:
        written_only: look at the pages that new tokens go to, and leave those of older tokens alone.
    """
    rows = _rows(checked)
    lengths = checked.cache_seqlens.tolist()
    room = checked.capacity - checked.new_tokens
    for b, length in enumerate(lengths):
        if not 0 <= length <= room:
            why = f"{checked.capacity} slots, {checked.new_tokens} for new tokens"
            raise InvalidInput("cache_seqlens", f"{length} for sequence {b}", f"0 to {room} ({why})")
    starts = lengths if written_only else _starts(checked, lengths)
    if checked.block_table is None:
        return
    table, size = checked.block_table.tolist(), checked.page_size
    for row, start, length in zip(rows, starts, lengths, strict=True):
        stop = length + checked.new_tokens
        _pages(table[row], row, range(start // size, -(-stop // size)), checked.k.shape[0])


def _rows(checked: KVCache) -> list[int]:
    if checked.cache_batch_idx is None:
        return list(range(checked.cache_seqlens.shape[0]))
    rows: list[int] = checked.cache_batch_idx.tolist()
    held = (checked.k if checked.block_table is None else checked.block_table).shape[0]
    for b, row in enumerate(rows):
        if not 0 <= row < held:
            raise InvalidInput("cache_batch_idx", f"{row} for sequence {b}", f"0 to {held - 1}")
    return rows


def _starts(checked: KVCache, lengths: list[int]) -> list[int]:
    if checked.cache_leftpad is None:
        return [0] * len(lengths)
    starts: list[int] = checked.cache_leftpad.tolist()
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        end = length + checked.new_tokens
        if not 0 <= start <= end:
            raise InvalidInput("cache_leftpad", f"{start} for sequence {b}", f"0 to {end}, its length")
    return starts


def _pages(table_row: list[int], row: int, columns: range, pages: int) -> None:
    for column in columns:
        if not 0 <= table_row[column] < pages:
            where = f"page {table_row[column]} at [{row}, {column}]"
            raise InvalidInput("block_table", where, f"0 to {pages - 1}: the cache has {pages} pages")
