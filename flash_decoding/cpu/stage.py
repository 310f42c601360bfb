"""Bring the keys or values of a few runs together, a chunk at a time, where one matrix product can read them.

A chunk is converted to the dtype of the computation on the way: it stays in the CPU's cache, so that this
costs little, and products in fp32 keep the scores exact. Only live tokens are read; behind a shorter run
there are zeros, which the mask hides and which, unlike whatever lies in the cache there, multiply to 0. So
there are where a key mask has holes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.cpu.runs import Group, Run, existing
from flash_decoding.errors import InvalidInput


class Scratch:
    """Memory for one chunk; it grows to what is asked for, and whatever was in it is lost."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view of it with this shape, not written yet."""
        elements = math.prod(shape)
        if self.buffer.numel() < elements or self.buffer.dtype != dtype:
            self.buffer = torch.empty(elements, dtype=dtype)
        return self.buffer[:elements].view(shape)


@dataclass(frozen=True)
class Stage:
    """Reads the keys, or the values, of a cache."""

    pool: Tensor
    block_table: Tensor | None
    dtype: torch.dtype
    """Of the computation."""
    key_mask: Tensor | None = None

    def is_view(self, group: Group) -> bool:
        """Whether one slice of the cache, in the right dtype, holds all keys of a group."""
        return self.key_mask is None and self.pool.dtype == self.dtype and self._is_slice(group)

    def _is_slice(self, group: Group) -> bool:
        return self.block_table is None and group.is_uniform

    def load(self, group: Group, keys: tuple[int, int], scratch: Scratch) -> Tensor:
        """Keys ``start <= c < stop`` of every run: (runs, stop - start, heads_kv, elements).

        A view of the cache where that will do, else a copy in scratch.
        """
        runs, first = len(group.runs), group.runs[0]
        rows = slice(first.row, first.row + runs)
        slots = slice(first.first_slot + keys[0], first.first_slot + keys[1])
        if self.is_view(group):
            return self.pool[rows, slots]
        staged = scratch.empty((runs, keys[1] - keys[0], *self.pool.shape[2:]), self.dtype)
        if self._is_slice(group):
            return self._without_holes(staged.copy_(self.pool[rows, slots]), group, keys)
        for i, run in enumerate(group.runs):
            live = min(max(run.keys - keys[0], 0), staged.shape[1])
            if live > 0:
                staged[i, :live] = self._tokens(run, run.first_slot + keys[0], live)
            staged[i, live:] = 0
        return self._without_holes(staged, group, keys)

    def _without_holes(self, staged: Tensor, group: Group, keys: tuple[int, int]) -> Tensor:
        if self.key_mask is None:
            return staged
        return staged.masked_fill_(~existing(self.key_mask, group, keys)[:, :, None, None], 0)

    def _tokens(self, run: Run, slot: int, count: int) -> Tensor:
        """``count`` tokens of a run, from an absolute slot on: (count, heads_kv, elements)."""
        if self.block_table is None:
            return self.pool[run.row, slot : slot + count]
        page_size = self.pool.shape[1]
        pages = self.block_table[run.row, slot // page_size : (slot + count - 1) // page_size + 1]
        low, high = (int(page) for page in pages.aminmax())
        if not 0 <= low <= high < self.pool.shape[0]:
            raise InvalidInput("block_table", [low, high], f"pages from 0 to {self.pool.shape[0] - 1}")
        gathered = self.pool.index_select(0, pages).flatten(0, 1)
        return gathered[slot % page_size :][:count]
