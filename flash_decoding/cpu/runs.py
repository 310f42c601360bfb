"""What each sequence has to attend to, in plain numbers, and which sequences go together.

On a CPU lengths are at hand, so every sequence becomes a *run*: the slots that its queries can see. From
there on the mask knows nothing of padding or of absolute slots: key ``c`` of a run of ``keys`` keys is
``c - (keys - q_len + i)`` slots ahead of query token ``i``; the last key sits under the last query token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import UNBOUNDED, KVCache, Options, Queries

SIMILAR = 1.25
"""Runs of a padded group have at most this many times the keys of the shortest, and SLACK more: padding that
small costs less than another round of operators."""

SLACK = 32


@dataclass(frozen=True)
class Run:
    """The keys of one sequence, and its queries."""

    sequence: int
    row: int
    """Row of the contiguous cache, or of the block table."""
    first_slot: int
    keys: int
    first_token: int
    """Where its queries start among all query tokens of the call."""
    q_len: int


@dataclass(frozen=True)
class Group:
    """Runs of one q_len and similar lengths, computed together; the shortest comes first."""

    runs: tuple[Run, ...]

    @property
    def q_len(self) -> int:
        return self.runs[0].q_len

    @property
    def shortest(self) -> int:
        return self.runs[0].keys

    @property
    def longest(self) -> int:
        return self.runs[-1].keys

    @cached_property
    def is_uniform(self) -> bool:
        """Same slots in neighbouring rows: a slice of the cache holds them all."""
        head = self.runs[0]
        return all(
            (run.row - head.row, run.first_slot, run.keys) == (i, head.first_slot, head.keys)
            for i, run in enumerate(self.runs)
        )


def find_runs(queries: Queries, cache: KVCache, options: Options) -> list[Run]:
    """One run per sequence that has query tokens."""
    batch = queries.batch
    seqlens = cache.cache_seqlens.tolist()
    rows = list(range(batch)) if cache.cache_batch_idx is None else cache.cache_batch_idx.tolist()
    starts = [0] * batch if cache.cache_leftpad is None else cache.cache_leftpad.tolist()
    if queries.cu_seqlens_q is None:
        tokens = [b * queries.q_len for b in range(batch + 1)]
    else:
        tokens = queries.cu_seqlens_q.tolist()
    runs = []
    for b in range(batch):
        q_len = tokens[b + 1] - tokens[b]
        length = min(max(seqlens[b], 0) + cache.new_tokens, cache.capacity)
        start = max(starts[b], 0)
        if options.window_left != UNBOUNDED:
            start = max(start, length - q_len - options.window_left)
        if length > start:
            _check_row(rows[b], cache)
        if q_len > 0:
            runs.append(Run(b, rows[b], start, max(length - start, 0), tokens[b], q_len))
    return runs


def _check_row(row: int, cache: KVCache) -> None:
    available = cache.k.shape[0] if cache.block_table is None else cache.block_table.shape[0]
    if not 0 <= row < available:
        raise InvalidInput("cache_batch_idx", row, f"rows from 0 to {available - 1}")


def existing(key_mask: Tensor, group: Group, keys: tuple[int, int]) -> Tensor:
    """Which of the keys ``start <= c < stop`` of each run the key mask leaves to it: (runs, stop - start)."""
    exist = torch.zeros(len(group.runs), keys[1] - keys[0], dtype=torch.bool)
    for row, run in zip(exist, group.runs, strict=True):
        known = key_mask[run.sequence, run.first_slot + keys[0] : run.first_slot + keys[1]]
        row[: len(known)] = known
    return exist


def make_groups(runs: list[Run], *, max_tokens: int, padded: bool) -> list[Group]:
    """Put runs of one q_len and equal lengths, or similar ones if ``padded``, together.

    A group has ``max_tokens`` keys at most, or one run: longer runs have a group of their own, and with 0
    all have.
    """
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.q_len, run.keys, run.row)):
        if groups and _belongs(run, groups[-1], max_tokens, padded):
            groups[-1].append(run)
        else:
            groups.append([run])
    return [Group(tuple(members)) for members in groups]


def _belongs(run: Run, group: list[Run], max_tokens: int, padded: bool) -> bool:
    longest = SIMILAR * group[0].keys + SLACK if padded else group[0].keys
    fits = run.keys * (len(group) + 1) <= max_tokens
    return run.q_len == group[0].q_len and run.keys <= longest and fits
