"""The rows of the attention suite: one decoding step each, in plain numbers, and the tensors it runs on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, Problem, Queries

ANNOUNCED = (
    (256, 256),
    (128, 512),
    (64, 1024),
    (32, 2048),
    (16, 4096),
    (8, 8192),
    (4, 16384),
    (2, 32768),
    (1, 65536),
    (1, 131072),
)
"""(batch, kv_len) of the table that announced Flash-Decoding, from many short sequences to one long one."""

QUICK = ((64, 1024), (8, 8192), (1, 65536))

CPU_BATCH_DIVISOR = 8
"""A CPU keeps every length and takes an eighth of the batch, so the rows of batch 1 stay full size."""

MAX_SETS = 64
"""Most input sets of a row: tiny rows would ask for thousands."""

NEEDLE_WEIGHT = 16
"""How many ordinary keys the first and the last key of every sequence each weigh, roughly."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. Its head counts and head_dim default to the announcement's."""

    batch: int
    kv_len: int
    dtype: torch.dtype
    device: torch.device
    heads_q: int = 16
    heads_kv: int = 2
    head_dim: int = 128
    q_len: int = 1

    @property
    def name(self) -> str:
        return f"{self.batch} x {self.kv_len}"

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def scale(self) -> float:
        """Factor of the scores, as every column uses it."""
        return float(self.head_dim**-0.5)

    @property
    def problem(self) -> Problem:
        """The same numbers as the planner knows them."""
        return Problem(
            batch=self.batch,
            q_len=self.q_len,
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            kv_len=self.kv_len,
            element_bytes=self.dtype.itemsize,
            return_lse=False,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, each read once."""
        return self.problem.kv_bytes


@dataclass(frozen=True, eq=False)
class Inputs:
    """One set of tensors of a case; every sequence fills its cache."""

    q: Tensor
    """(batch, q_len, heads_q, head_dim)."""
    k: Tensor
    """(batch, kv_len, heads_kv, head_dim), contiguous."""
    v: Tensor
    cache_seqlens: Tensor
    """(batch,) int32 on the device: all kv_len."""

    def sequences(self, rows: Tensor) -> tuple[Queries, KVCache]:
        """The records of some sequences only, copied out of the set."""
        lengths = self.cache_seqlens[rows]
        return Queries(self.q[rows]), KVCache(self.k[rows], self.v[rows], lengths)


def announced_cases(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> list[Case]:
    """The announcement's rows, or three of them; on a CPU with an eighth of each batch."""
    divisor = CPU_BATCH_DIVISOR if device.type == "cpu" else 1
    rows = QUICK if quick else ANNOUNCED
    return [Case(batch=max(1, b // divisor), kv_len=n, dtype=dtype, device=device) for b, n in rows]


def parse_rows(text: str, like: Case) -> list[Case]:
    """Rows written as ``256x256,1x65536`` (batch x length).

    Raises:
        InvalidInput: a row is not two positive integers around an ``x``.
    """
    return [_parse_row(row, like) for row in text.split(",")]


def _parse_row(row: str, like: Case) -> Case:
    batch, cross, kv_len = row.strip().partition("x")
    numbers = (batch.strip(), kv_len.strip())
    if not cross or not all(n.isdecimal() and int(n) > 0 for n in numbers):
        raise InvalidInput("rows", repr(row), "batch x length in positive integers, such as 1x65536")
    return replace(like, batch=int(numbers[0]), kv_len=int(numbers[1]))


def set_count(case: Case, cache_bytes: int) -> int:
    """How many input sets to rotate over, so that no call finds its keys in a cache of ``cache_bytes``.

    Together they hold at least four times the cache (within :data:`MAX_SETS`), and there are at least two.
    """
    return min(max(2, math.ceil(4 * cache_bytes / case.kv_bytes)), MAX_SETS)


def make_inputs(case: Case, *, seed: int) -> Inputs:
    """Draw one set. The first and last key of each sequence weigh more, so that losing either one shows.

    A lone ordinary key among 65536 weighs less than the roundings of half precision.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    q = _randn(case, case.q_len, case.heads_q, generator)
    k = _randn(case, case.kv_len, case.heads_kv, generator)
    v = _randn(case, case.kv_len, case.heads_kv, generator)
    k[:, 0] = k[:, -1] = _needle(case, q)
    lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=case.device)
    return Inputs(q, k, v, lengths)


def _randn(case: Case, tokens: int, heads: int, generator: torch.Generator) -> Tensor:
    shape = (case.batch, tokens, heads, case.head_dim)
    return torch.randn(shape, generator=generator, dtype=case.dtype, device=case.device)


def _needle(case: Case, q: Tensor) -> Tensor:
    """A key per (sequence, KV head) whose score with the mean query of its group is about as wanted.

    Scores of random keys are near N(0, 1), whose exponential is ``e^0.5`` on average. Much larger scores than
    this would round so coarsely in half precision that a lost tile of ordinary keys no longer showed.
    """
    score = math.log(NEEDLE_WEIGHT) + 0.5
    grouped = q[:, -1].float().view(case.batch, case.heads_kv, case.group, case.head_dim)
    direction = grouped.mean(2)
    needle: Tensor = direction * score / (direction.square().sum(-1, keepdim=True) * case.scale)
    return needle.to(case.dtype)
