"""Calls of a kind that was made before: no checks, no plan, nothing but outputs, scratch and launches.

Whether a call is refused, and what it launches, follows from its numbers, and from the dtypes, devices,
shapes, strides and alignment of its tensors: that is its *kind*. Lengths, pages and all else that tensors
hold is read on the device (contract C4), and Triton compiles for alignment, never for an address. So when a
call of the same kind comes, the launches of the first are made again, with the addresses of the second.

The tensors of attention are, in the order of its operator: q, k_cache, v_cache, cache_seqlens, block_table,
cache_batch_idx, cache_leftpad, key_mask, cu_seqlens_q, alibi_slopes, sinks; None for those that a call lacks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flash_decoding.kernels.repeat import Repeat

Kind = tuple[Any, ...]
Addresses = list[int | None]
Steps = Callable[[Addresses], Any]

MAX_KEPT = 1024
"""Kinds kept: a model has a few, but keys that grow by concatenation bring a new one with every token."""

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for addresses that are multiples of it, another for all others."""

ON_ROCM = torch.version.hip is not None
NEAR = 2**31
"""Bytes. For ROCm Triton compiles one kernel for storages that end before, another for larger ones."""

_NUMBERS = frozenset({int, float, bool, str, type(None)})

_kept: dict[Kind, Steps] = {}


def are_numbers(values: Iterable[object]) -> bool:
    """True where a kind can be told by these values: callers may pass anything."""
    return _NUMBERS.issuperset(map(type, values))


def kind_of(tensors: Iterable[Tensor | None], numbers: tuple[Any, ...]) -> tuple[Kind, Addresses]:
    """All that decides what a call launches and whether it is refused; and where its tensors lie."""
    # Types stand beside the numbers, for 1 == 1.0 == True is not what the checks say.
    facts: list[Any] = [numbers, tuple(map(type, numbers)), torch.is_grad_enabled()]
    addresses: Addresses = []
    for x in tensors:
        if x is None:
            addresses.append(None)
            facts.append(None)
            continue
        address = x.data_ptr()
        addresses.append(address)
        aligned = address % ALIGNMENT == 0
        near = ON_ROCM and x.untyped_storage().size() < NEAR
        facts.append((x.dtype, x.device, x.shape, x.stride(), aligned, near, x.requires_grad))
    return tuple(facts), addresses


def find(kind: Kind) -> Steps | None:
    """What was kept of a call of this kind: takes the addresses of another, returns its result."""
    return _kept.get(kind)


def keep(kind: Kind, steps: Steps) -> None:
    """Remember how to make calls of this kind."""
    if len(_kept) >= MAX_KEPT:
        _kept.clear()
    _kept[kind] = steps


def forget() -> None:
    """Make the next call of every kind as if it were the first."""
    _kept.clear()


@dataclass(frozen=True)
class AttentionSteps:
    """Launches of a call to attention, and the memory that they need."""

    attend: Repeat
    combine: Repeat | None
    """None where there is nothing to combine; then there is no scratch either."""
    out: Tensor
    """What the result looks like, without memory; so are the others."""
    lse: Tensor | None = None
    """None where nobody asked for the LSE."""
    scratch: Tensor | None = None
    """Parts and their LSEs, one behind the other."""
    part_bytes: int = 0

    def __call__(self, addresses: Addresses) -> tuple[Tensor, Tensor | None]:
        """Out, and the LSE where it is asked for, of another call of the kind."""
        q, k, v, seqlens, table, batch_idx, leftpad, mask, cu_q, alibi, sinks = addresses
        out = torch.empty_like(self.out)
        lse, lse_address = None, None
        if self.lse is not None:
            lse = torch.empty_like(self.lse)
            lse_address = lse.data_ptr()
        options = (seqlens, leftpad, mask, batch_idx, table, cu_q, alibi, sinks)
        if self.combine is None or self.scratch is None:
            self.attend(q, k, v, out.data_ptr(), lse_address, *options)
            return out, lse
        # One tensor for both: head_dim_v is a multiple of 8, so the second part is aligned as the first.
        scratch = torch.empty_like(self.scratch)
        parts = scratch.data_ptr()
        part_lse = parts + self.part_bytes
        self.attend(q, k, v, parts, part_lse, *options)
        self.combine(parts, part_lse, out.data_ptr(), lse_address, seqlens, leftpad, cu_q)
        return out, lse


@functools.lru_cache(maxsize=MAX_KEPT)
def shell(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without memory, to make others like it: PyTorch reads it faster than a shape and options."""
    x = torch.empty(shape, dtype=dtype, device=device)
    x.untyped_storage().resize_(0)
    return x


@dataclass(frozen=True)
class AppendSteps:
    """The launch of an append."""

    append: Repeat

    def __call__(self, addresses: Addresses) -> None:
        """Write the tokens of another call of the kind."""
        k, v, k_cache, v_cache, seqlens, table, batch_idx, q, q_rotated, cos, sin = addresses
        self.append(k, v, q, k_cache, v_cache, q_rotated, cos, sin, seqlens, batch_idx, table)
