"""The rows of the attention suites: one decoding step each, in plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_decoding.errors import InvalidInput
from flash_decoding.spec import UNBOUNDED, Options, Problem

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table. Its head counts and head_dim default to the announcement's."""

    batch: int
    kv_len: int
    """Slots of each sequence; it fills them, unless ``lengths`` says otherwise."""
    dtype: torch.dtype
    device: torch.device
    heads_q: int = 16
    heads_kv: int = 2
    head_dim: int = 128
    q_len: int = 1
    label: str = ""
    """What the row is called; its batch and length if empty."""
    lengths: tuple[int, ...] = ()
    """Live tokens of each sequence where they differ; the longest is ``kv_len``."""
    page_size: int = 0
    """Tokens in a page, 0 where the cache is contiguous."""
    window: int = 0
    """Keys that a query token sees, its own among them; 0: all."""

    @property
    def name(self) -> str:
        return self.label or f"{self.batch} x {self.kv_len}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def live(self) -> tuple[int, ...]:
        """Live tokens of each sequence."""
        return self.lengths or (self.kv_len,) * self.batch

    @property
    def visible(self) -> tuple[tuple[int, int], ...]:
        """For each sequence the slots that it sees: the first, and the one behind the last."""
        seen = self.window + self.q_len - 1 if self.window else self.kv_len
        return tuple((max(0, length - seen), length) for length in self.live)

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv

    @property
    def scale(self) -> float:
        """Factor of the scores, as every column uses it."""
        return float(self.head_dim**-0.5)

    def sees(self, start: int, stop: int) -> Tensor:
        """(q_len, stop - start) bool: which slots each query token of a sequence of length ``stop`` sees."""
        slots = torch.arange(start, stop, device=self.device)
        position = torch.arange(stop - self.q_len, stop, device=self.device)[:, None]
        seen = slots <= position
        return seen & (slots > position - self.window) if self.window else seen

    @property
    def window_size(self) -> tuple[int, int]:
        """The window as the public functions take it."""
        return (self.window - 1, 0) if self.window else (UNBOUNDED, UNBOUNDED)

    @property
    def options(self) -> Options:
        """What is asked of scores and mask; causal, which one query token does not notice."""
        return Options.make(head_dim=self.head_dim, causal=True, window_size=self.window_size)

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
            page_size=self.page_size,
            window_left=self.window_size[0],
            plain=self.options.is_plain,
            return_lse=False,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that somebody sees, each read once."""
        tokens = sum(stop - start for start, stop in self.visible)
        return 2 * tokens * self.heads_kv * self.head_dim * self.dtype.itemsize


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
