"""Calls of a kind that was made before: no record, no plan, nothing but outputs, scratch and launches.

What a call launches follows from its numbers, and from the dtypes, devices, shapes, strides and alignment of
its tensors: that is its *kind*. Lengths, pages and all else that tensors hold is read on the device (contract
C4), and Triton compiles for alignment, never for an address. So when a call of the same kind comes, the
launches of the first are made again, with the addresses of the second.

A call is the tuple of an operator's arguments, tensors (or None) before numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flash_decoding.kernels.repeat import Repeat

Call = tuple[Any, ...]
Kind = tuple[Any, ...]
Addresses = list[int | None]

MAX_KEPT = 1024
"""Kinds kept: a model has a few, but keys that grow by concatenation bring a new one with every token."""

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for addresses that are multiples of it, another for all others."""

_kept: dict[Kind, Callable[[Call, Addresses], Any]] = {}


def kind_of(call: Call, tensors: int) -> Kind:
    """All that decides what a call launches, its first ``tensors`` arguments being tensors or None."""
    facts = [
        None if x is None else (x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % ALIGNMENT == 0)
        for x in call[:tensors]
    ]
    return (call[tensors:], *facts)


def addresses_of(call: Call, tensors: int) -> Addresses:
    """Where the tensors of a call lie."""
    return [None if x is None else x.data_ptr() for x in call[:tensors]]


def find(kind: Kind) -> Callable[[Call, Addresses], Any] | None:
    """What was kept of a call of this kind: takes another such call and its addresses, returns its result."""
    return _kept.get(kind)


def keep(kind: Kind, steps: Callable[[Call, Addresses], Any]) -> None:
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
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...] | None
    """None where nobody asked for the LSE."""
    part_floats: int = 0
    part_lse_floats: int = 0

    def __call__(self, call: Call, addresses: Addresses) -> tuple[Tensor, Tensor]:
        """Out and LSE (or an empty tensor) of another call of the kind."""
        q, k, v, seqlens, table, batch_idx, leftpad, mask, cu_q, alibi, sinks = addresses
        dtype, device = call[0].dtype, call[0].device
        result = torch.empty(self.out_shape, dtype=dtype, device=device)
        result_lse = torch.empty(self.lse_shape or (0,), dtype=torch.float32, device=device)
        out: int = result.data_ptr()
        lse = None if self.lse_shape is None else result_lse.data_ptr()
        options = (seqlens, leftpad, mask, batch_idx, table, cu_q, alibi, sinks)
        if self.combine is None:
            self.attend(q, k, v, out, lse, *options)
            return result, result_lse
        # One tensor for both: head_dim_v is a multiple of 8, so the second part is aligned as the first.
        floats = self.part_floats + self.part_lse_floats
        scratch = torch.empty(floats, dtype=torch.float32, device=device)
        parts = scratch.data_ptr()
        part_lse = parts + 4 * self.part_floats
        self.attend(q, k, v, parts, part_lse, *options)
        self.combine(parts, part_lse, out, lse, seqlens, leftpad, cu_q)
        return result, result_lse


@dataclass(frozen=True)
class AppendSteps:
    """The launch of an append."""

    append: Repeat

    def __call__(self, call: Call, addresses: Addresses) -> None:
        """Write the tokens of another call of the kind."""
        k, v, k_cache, v_cache, seqlens, table, batch_idx, q, q_rotated, cos, sin = addresses
        self.append(k, v, q, k_cache, v_cache, q_rotated, cos, sin, seqlens, batch_idx, table)
