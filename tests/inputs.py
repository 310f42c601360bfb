"""Inputs of every kind, made from one record: what tests and their failures are described by."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flash_decoding.spec import UNBOUNDED, KVCache, Options, Queries

Layout = Literal["bshd", "bhsd", "padded"]

KeyMask = Literal["", "holes", "short", "far", "none"]
"""Slots that exist: all; every other one or so; half of the first half; the last eighth; none at all."""

WILD_PAGES = (-1, 2**31 - 1, -(2**31), 123_456_789)
"""What unused entries of a block table hold in tests: following one of them would be noticed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to attention, in plain values; :func:`make_inputs` turns it into tensors."""

    name: str = ""
    batch: int = 2
    q_len: int = 1
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int = 0
    """0: as head_dim."""
    capacity: int = 64
    """Slots per sequence; of a paged cache it is rounded up to whole pages."""
    page_size: int = 0
    dtype: torch.dtype = torch.float32
    seqlens: tuple[int, ...] | None = None
    """cache_seqlens, one per sequence; None fills the capacity."""
    dense: bool = False
    """Say that every sequence fills its capacity (which seqlens then must do)."""
    new_tokens: int = 0
    leftpad: tuple[int, ...] | None = None
    key_mask: KeyMask = ""
    q_lens: tuple[int, ...] | None = None
    """Makes the queries ragged (packed); q_len is then ignored."""
    batch_idx: bool = False
    """The cache has two more rows than the batch, in another order."""
    packed: bool = False
    """Keys of all sequences in one shared row (varlen): seqlens are the lengths; contiguous only."""
    layout: Layout = "bshd"
    """How q and a contiguous cache lie in memory: as viewed, heads first, or inside wider rows."""
    causal: bool = False
    window: tuple[int, int] = (UNBOUNDED, UNBOUNDED)
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: Literal["", "heads", "batch"] = ""
    sinks: bool = False

    @property
    def value_dim(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def slots(self) -> int:
        """Capacity of one sequence, whole pages counted."""
        return -(-self.capacity // self.page_size) * self.page_size if self.page_size else self.capacity

    @property
    def lengths(self) -> tuple[int, ...]:
        """cache_seqlens per sequence."""
        return self.seqlens or (self.slots - self.new_tokens,) * self.batch

    def __str__(self) -> str:
        return self.name or repr(self)


class Inputs(NamedTuple):
    """The arguments of one attention call."""

    queries: Queries
    cache: KVCache
    options: Options


def make_inputs(
    case: Case, *, device: torch.device | str = "cpu", seed: int = 0, poison: float = math.nan
) -> Inputs:
    """Build the tensors of a case. Every slot outside the live ones holds ``poison``.

    Values come from a CPU generator, so that a failure seen on a GPU is the same case on a CPU.
    """
    factory = _Factory(case, torch.device(device), torch.Generator().manual_seed(seed), poison)
    cache = factory.packed_cache() if case.packed else factory.cache()
    if case.key_mask:
        cache = factory.with_holes(cache)
    return Inputs(factory.queries(), cache, factory.options())


def in_layout(values: Tensor, layout: Layout) -> Tensor:
    """The same (..., tokens, heads, elements) tensor, laid out otherwise in memory (gaps hold NaN)."""
    if layout == "bhsd":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "padded":
        wide = values.new_full((*values.shape[:-2], values.shape[-2] + 1, values.shape[-1] + 8), math.nan)
        view = wide[..., :-1, : values.shape[-1]]
        view.copy_(values)
        return view
    return values.contiguous()


def exists(cache: KVCache, b: int, slots: Tensor) -> Tensor:
    """Which of the slots the key mask leaves to sequence ``b``, by its definition."""
    if cache.key_mask is None:
        return torch.ones_like(slots, dtype=torch.bool)
    missing = cache.capacity - cache.key_mask.shape[1]
    return torch.nn.functional.pad(cache.key_mask[b], (0, missing))[slots]


def hidden_slots(cache: KVCache, b: int) -> Tensor:
    """Slots between the padding and the length of sequence ``b`` that the key mask takes away."""
    start = 0 if cache.cache_leftpad is None else int(cache.cache_leftpad[b])
    stop = min(int(cache.cache_seqlens[b]) + cache.new_tokens, cache.capacity)
    slots = torch.arange(start, max(start, stop), device=cache.k.device)
    return slots[~exists(cache, b, slots)]


@dataclass(frozen=True)
class _Factory:
    case: Case
    device: torch.device
    generator: torch.Generator
    poison: float

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.case.dtype)

    def place(self, values: Tensor) -> Tensor:
        """On the device, in the memory layout of the case."""
        return in_layout(values.to(self.device), self.case.layout)

    def ints(self, values: Sequence[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def options(self) -> Options:
        case = self.case
        shape = (case.batch, case.heads_q) if case.alibi == "batch" else (case.heads_q,)
        slopes = (torch.rand(shape, generator=self.generator) * 0.3).to(self.device)
        sinks = torch.randn(case.heads_q, generator=self.generator).to(self.device)
        if case.dtype != torch.float64:  # a model's sinks have the dtype of its other weights
            sinks = sinks.to(case.dtype)
        return Options.make(
            head_dim=case.head_dim,
            softmax_scale=case.softmax_scale,
            causal=case.causal,
            window_size=case.window,
            softcap=case.softcap,
            alibi_slopes=slopes if case.alibi else None,
            sinks=sinks if case.sinks else None,
        )

    def queries(self) -> Queries:
        case = self.case
        if case.q_lens is None:
            return Queries(self.place(self.randn(case.batch, case.q_len, case.heads_q, case.head_dim)))
        offsets = self.ints(list(itertools.accumulate(case.q_lens, initial=0)))
        q = self.place(self.randn(sum(case.q_lens), case.heads_q, case.head_dim))
        return Queries(q, offsets, max(case.q_lens))

    def packed_cache(self) -> KVCache:
        """All keys in one row that every sequence sees through a batch stride of 0."""
        case = self.case
        offsets = self.ints(list(itertools.accumulate(case.lengths, initial=0)))
        shape = (1, sum(case.lengths), case.heads_kv)
        k, v = (
            self.place(self.randn(*shape, dim)).expand(case.batch, -1, -1, -1)
            for dim in (case.head_dim, case.value_dim)
        )
        longest = max(case.lengths)
        return KVCache(k, v, offsets[1:].clone(), cache_leftpad=offsets[:-1].clone(), max_kv_len=longest)

    def cache(self) -> KVCache:
        case = self.case
        rows = case.batch + 2 * case.batch_idx
        row_of = torch.randperm(rows, generator=self.generator).tolist()[: case.batch]
        row_of = row_of if case.batch_idx else list(range(case.batch))
        spans = [(0, 0)] * rows
        for row, start, length in zip(row_of, case.leftpad or (0,) * case.batch, case.lengths, strict=True):
            spans[row] = (start, min(length + case.new_tokens, case.slots))
        k, v, block_table = self.paged(spans) if case.page_size else (*self.contiguous(spans), None)
        return KVCache(
            self.place(k),
            self.place(v),
            self.ints(case.lengths),
            block_table=block_table,
            cache_batch_idx=self.ints(row_of) if case.batch_idx else None,
            cache_leftpad=None if case.leftpad is None else self.ints(case.leftpad),
            new_tokens=case.new_tokens,
            dense=case.dense,
        )

    def with_holes(self, cache: KVCache) -> KVCache:
        """The cache under the key mask of the case; what the mask hides is poisoned."""
        kind, slots = self.case.key_mask, cache.capacity
        exist = torch.rand(
            self.case.batch, slots // 2 if kind == "short" else slots, generator=self.generator
        )
        if kind == "far":
            exist[:, : slots - slots // 8] = 1.0
        wide = torch.ones(self.case.batch, exist.shape[1] + 3, dtype=torch.bool)
        mask = wide[:, 1:-2]  # rows neither begin nor follow each other where memory is aligned
        mask.copy_(exist < {"far": 1.0, "none": 0.0}.get(kind, 0.5))
        wide = wide.to(self.device)
        masked = dataclasses.replace(cache, key_mask=wide[:, 1:-2])
        for b in range(self.case.batch):
            self.poison_slots(cache, b, hidden_slots(masked, b))
        return masked

    def poison_slots(self, cache: KVCache, b: int, slots: Tensor) -> None:
        row = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
        for pool in (cache.k, cache.v):
            if cache.block_table is None:
                pool[row][slots] = self.poison
            else:
                pages = cache.block_table[row, slots // cache.page_size].long()
                pool[pages, slots % cache.page_size] = self.poison

    def pools(self, blocks: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Poisoned storage for keys and for values."""
        k, v = (
            torch.full((blocks, tokens, self.case.heads_kv, dim), self.poison, dtype=self.case.dtype)
            for dim in (self.case.head_dim, self.case.value_dim)
        )
        return k, v

    def contiguous(self, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        pools = self.pools(len(spans), self.case.slots)
        for pool, (row, (start, stop)) in itertools.product(pools, enumerate(spans)):
            live = max(stop - start, 0)
            pool[row, start : start + live] = self.randn(live, *pool.shape[2:])
        return pools

    def paged(self, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Shuffled pages of a pool that has three to spare; unused table entries are :data:`WILD_PAGES`."""
        size = self.case.page_size
        max_pages = self.case.slots // size
        pages = len(spans) * max_pages + 3
        free = torch.randperm(pages, generator=self.generator).tolist()
        table = [[WILD_PAGES[column % 4] for column in range(max_pages)] for _ in spans]
        k, v = self.pools(pages, size)
        for row, (start, stop) in enumerate(spans):
            for column in range(start // size, -(-stop // size) if stop > start else 0):
                page = table[row][column] = free.pop()
                live = slice(max(start - column * size, 0), min(stop - column * size, size))
                k[page, live] = self.randn(live.stop - live.start, *k.shape[2:])
                v[page, live] = self.randn(live.stop - live.start, *v.shape[2:])
        return k, v, self.ints(table)
