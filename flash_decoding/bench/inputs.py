"""The tensors that a row of the attention suites runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.bench.cases import Case
from flash_decoding.spec import KVCache, Queries

NEEDLE_WEIGHT = 16
"""How many ordinary keys the first and the last visible key of every sequence each weigh, roughly."""

NEEDLE_LENGTH = 65536
"""Beyond this length needles grow with its root, as the rest of the output shrinks."""

DECOY_VALUE = 8.0
"""Values of the hidden keys next to the visible ones, many times an ordinary one."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors of a case."""

    q: Tensor
    """(batch, q_len, heads_q, head_dim)."""
    k: Tensor
    """(batch, kv_len, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim); contiguous."""
    v: Tensor
    cache_seqlens: Tensor
    """(batch,) int32 on the device, also where all are equal: nobody is told that they are."""
    block_table: Tensor | None = None
    """(batch, max_pages) int32: pages in no order, each in use once; 0 behind the last one of a sequence."""

    def sequence(self, b: int) -> tuple[Queries, KVCache]:
        """The records of one sequence alone, as views."""
        row, table = slice(b, b + 1), self.block_table
        queries, length = Queries(self.q[row]), self.cache_seqlens[row]
        if table is None:
            return queries, KVCache(self.k[row], self.v[row], length)
        return queries, KVCache(self.k, self.v, length, block_table=table[row])

    def locate(self, rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The first two indices into k and v of some slots (int64) of some sequences."""
        if self.block_table is None:
            return rows, slots
        page_size = self.k.shape[1]
        return self.block_table[rows, slots // page_size].long(), slots % page_size

    def dense(self, case: Case) -> tuple[Tensor, Tensor]:
        """Keys and values that somebody sees, (batch, slots, heads_kv, head_dim), as views.

        For contiguous caches and equal lengths: a window is then a slice, which anybody can attend to.
        """
        ((start, stop),) = set(case.visible)
        return self.k[:, start:stop], self.v[:, start:stop]

    def seen(self, case: Case, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence that somebody sees, (slots, heads_kv, head_dim)."""
        start, stop = case.visible[b]
        if self.block_table is None:
            return self.k[b, start:stop], self.v[b, start:stop]
        slots = torch.arange(start, stop, device=self.k.device)
        index = self.locate(torch.full_like(slots, b), slots)
        return self.k[index], self.v[index]


def make_inputs(case: Case, *, seed: int) -> Inputs:
    """Draw one set, in which a key too few or too many shows.

    The first and last visible key of each sequence weigh more: a lone ordinary key among 65536 weighs less
    than the roundings of half precision. The hidden keys next to them weigh as much and have large values.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    table = _draw_table(case, generator)
    rows, slots = (case.batch, case.kv_len) if table is None else (_page_count(case), case.page_size)
    q = _randn(case, (case.batch, case.q_len, case.heads_q), generator)
    k, v = (_randn(case, (rows, slots, case.heads_kv), generator) for _ in range(2))
    lengths = torch.tensor(case.live, dtype=torch.int32, device=case.device)
    inputs = Inputs(q, k, v, lengths, table)
    _hide_needles(case, inputs)
    return inputs


def _randn(case: Case, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, case.head_dim, generator=generator, dtype=case.dtype, device=case.device)


def _pages_of(case: Case) -> list[int]:
    return [-(-length // case.page_size) for length in case.live]


def _page_count(case: Case) -> int:
    return sum(_pages_of(case))


def _draw_table(case: Case, generator: torch.Generator) -> Tensor | None:
    """Which pages each sequence has: all of the pool, shuffled."""
    if not case.page_size:
        return None
    counts = _pages_of(case)
    order = torch.randperm(sum(counts), generator=generator, device=case.device).int()
    owned = torch.split(order, counts)
    return torch.nn.utils.rnn.pad_sequence(list(owned), batch_first=True)


def _hide_needles(case: Case, inputs: Inputs) -> None:
    """Put the heavy keys where they belong, in place."""
    needle = _needle(case, inputs.q)
    rows = torch.arange(case.batch, device=case.device)
    starts, stops = (torch.tensor(ends, device=case.device) for ends in zip(*case.visible, strict=True))
    for decoy in (starts - 1, stops):
        exists = (decoy >= 0) & (decoy < _capacities(case))
        index = inputs.locate(rows[exists], decoy[exists])
        inputs.k[index] = needle[exists]
        inputs.v[index] = DECOY_VALUE
    for slots in (starts, stops - 1):
        inputs.k[inputs.locate(rows, slots)] = needle


def _capacities(case: Case) -> Tensor:
    """Slots that each sequence has, in use or not."""
    owned = (
        [pages * case.page_size for pages in _pages_of(case)]
        if case.page_size
        else [case.kv_len] * case.batch
    )
    return torch.tensor(owned, device=case.device)


def _needle(case: Case, q: Tensor) -> Tensor:
    """A key per (sequence, KV head) whose score with the mean query of its group is about as wanted.

    Scores of random keys are near N(0, 1), whose exponential is ``e^0.5`` on average. Much larger scores than
    this would round so coarsely in half precision that a lost tile of ordinary keys no longer showed.
    """
    weights = [NEEDLE_WEIGHT * max(1.0, length / NEEDLE_LENGTH) ** 0.5 for length in case.live]
    score = torch.tensor(weights, device=case.device).log()[:, None, None] + 0.5
    grouped = q[:, -1].float().view(case.batch, case.heads_kv, case.group, case.head_dim)
    direction = grouped.mean(2)
    needle: Tensor = direction * score / (direction.square().sum(-1, keepdim=True) * case.scale)
    return needle.to(case.dtype)


def runs_of(case: Case, inputs: Inputs) -> Iterator[tuple[int, int]]:
    """The slots that somebody sees, as they lie in memory: (first slot of k and v flattened, how many)."""
    table = None if inputs.block_table is None else inputs.block_table.tolist()
    for b, (start, stop) in enumerate(case.visible):
        if table is None:
            yield b * case.kv_len + start, stop - start
            continue
        for page in range(start // case.page_size, -(-stop // case.page_size)):
            first = max(start, page * case.page_size)
            last = min(stop, (page + 1) * case.page_size)
            yield table[b][page] * case.page_size + first % case.page_size, last - first
