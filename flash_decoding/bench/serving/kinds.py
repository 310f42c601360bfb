"""The kinds of work as data: a row of the table each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flash_decoding.bench.cases import Case
from flash_decoding.errors import InvalidInput

CPU_LENGTH_DIVISOR = 32
CPU_BATCH_DIVISOR = 4
"""A CPU takes every fourth sequence, of a 32th of the length, and keeps heads, pages and query tokens."""


def equal(batch: int, length: int) -> tuple[int, ...]:
    """Sequences of one length."""
    return (length,) * batch


def ragged(batch: int, longest: int) -> tuple[int, ...]:
    """Lengths from 1 to ``longest``, both among them: drawn evenly, and always the same."""
    draw = random.Random(batch)
    lengths = [draw.randint(1, longest) for _ in range(batch)]
    lengths[batch // 4], lengths[batch // 2] = 1, longest
    return tuple(lengths)


def one_among(batch: int, long: int, short: int) -> tuple[int, ...]:
    """One long sequence in the middle of short ones."""
    lengths = [short] * batch
    lengths[batch // 2] = long
    return tuple(lengths)


@dataclass(frozen=True)
class Kind:
    """One kind of work, in the words of :class:`~flash_decoding.bench.cases.Case`."""

    name: str
    lengths: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int = 128
    q_len: int = 1
    page_size: int = 0
    window: int = 0

    def scaled_down(self) -> Kind:
        """The same structure in a size that suits a CPU."""
        lengths = tuple(
            max(self.q_len, -(-n // CPU_LENGTH_DIVISOR)) for n in self.lengths[::CPU_BATCH_DIVISOR]
        )
        return replace(self, lengths=lengths, window=self.window // CPU_LENGTH_DIVISOR)

    def case(self, device: torch.device, dtype: torch.dtype) -> Case:
        """The row of the table."""
        return Case(
            label=self.name,
            batch=len(self.lengths),
            kv_len=max(self.lengths),
            lengths=self.lengths if len(set(self.lengths)) > 1 else (),
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            q_len=self.q_len,
            page_size=self.page_size,
            window=self.window,
            device=device,
            dtype=dtype,
        )


KINDS = (
    Kind("mha-32-32", equal(8, 2048), 32, 32),
    Kind("gqa-32-8", equal(16, 4096), 32, 8),
    Kind("gqa-32-8-1gib", equal(16, 16384), 32, 8),
    Kind("gqa-64-8", equal(32, 2048), 64, 8),
    Kind("gqa-40-8", equal(4, 16384), 40, 8),
    Kind("mha-32-32-dim64", equal(8, 4096), 32, 32, head_dim=64),
    Kind("gqa-32-8-dim64", equal(16, 8192), 32, 8, head_dim=64),
    Kind("gqa-32-8-dim256", equal(8, 4096), 32, 8, head_dim=256),
    Kind("ragged-16k-pages16", ragged(32, 16384), 32, 8, page_size=16),
    Kind("ragged-16k-pages16-dim256", ragged(32, 16384), 16, 8, head_dim=256, page_size=16),
    Kind("one-128k-among-512-pages64", one_among(64, 131072, 512), 32, 8, page_size=64),
    Kind("verify-q1", equal(4, 20000), 64, 8, q_len=1),
    Kind("verify-q2", equal(4, 20000), 64, 8, q_len=2),
    Kind("verify-q4", equal(4, 20000), 64, 8, q_len=4),
    Kind("verify-q8", equal(4, 20000), 64, 8, q_len=8),
    Kind("verify-q4-pages16", equal(4, 20000), 64, 8, q_len=4, page_size=16),
    Kind("verify-q4-dim256", equal(4, 10000), 64, 8, head_dim=256, q_len=4),
    Kind("mqa-48-1", equal(16, 8192), 48, 1),
    Kind("single-1m-8-1", equal(1, 1 << 20), 8, 1),
    Kind("single-4096-32-8", equal(1, 4096), 32, 8),
    Kind("single-512-64-8", equal(1, 512), 64, 8),
    Kind("single-256-32-8", equal(1, 256), 32, 8),
    Kind("batch-256-of-256", equal(256, 256), 32, 8),
    Kind("window-4096-of-64k", equal(16, 65536), 32, 8, window=4096),
)
"""256 MiB and more where the memory alone counts, then what is harder than that."""


def serving_cases(device: torch.device, dtype: torch.dtype, names: str | None = None) -> list[Case]:
    """The kinds of work as cases, scaled down on a CPU.

    Args:
        device: where they run.
        dtype: of queries and cache.
        names: which of them, with commas between; None: all.

    Raises:
        InvalidInput: a name that none of them has.
    """
    kinds = KINDS if names is None else _named(names.split(","))
    return [(kind.scaled_down() if device.type == "cpu" else kind).case(device, dtype) for kind in kinds]


def _named(names: Sequence[str]) -> list[Kind]:
    known = {kind.name: kind for kind in KINDS}
    unknown = [name for name in names if name.strip() not in known]
    if unknown:
        raise InvalidInput("cases", repr(unknown[0]), " or ".join(known))
    return [known[name] for name in dict.fromkeys(name.strip() for name in names)]


def shape_of(case: Case) -> str:
    """A case in words, for readers of table and picture."""
    lengths = sorted(set(case.live))
    length = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    parts = [f"{case.batch} x {length}", f"{case.heads_q}/{case.heads_kv} heads of {case.head_dim}"]
    parts += [f"q_len {case.q_len}"] if case.q_len > 1 else []
    parts += [f"pages of {case.page_size}"] if case.page_size else []
    parts += [f"window {case.window}"] if case.window else []
    return ", ".join([*parts, f"{case.kv_bytes / (1 << 20):.0f} MiB"])
