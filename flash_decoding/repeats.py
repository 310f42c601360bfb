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
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards

Kind = tuple[Any, ...]
Addresses = list[int]
"""Of the tensors that there are."""

Launches = Callable[[list[int | None]], object]
"""Take addresses of what a call was given, then of what it makes (None where it does not), and launch."""

Steps = Callable[[Addresses], Any]
Sizes = tuple[int, ...]
Maker = Callable[[Sizes, Sizes, torch.dtype], Tensor]

MAX_KEPT = 1024
"""Kinds kept: a model has a few, but keys that grow by concatenation bring a new one with every token."""

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for addresses that are multiples of it, another for all others."""

ON_ROCM = torch.version.hip is not None
NEAR = 2**31
"""Bytes. For ROCm Triton compiles one kernel for storages that end before, another for larger ones."""

_NUMBERS = frozenset({int, float, bool, str, type(None)})

_facts = operator.attrgetter("dtype", "device", "shape")
_facts_with_grad = operator.attrgetter("dtype", "device", "shape", "requires_grad")
_strides, _address_of = Tensor.stride, Tensor.data_ptr
_is_grad_recorded = torch.is_grad_enabled
_is_deterministic = torch._C._get_deterministic_algorithms
_QUICK: dict[str, Maker | None] = {
    device: getattr(guards, f"_empty_strided_{device}", None) for device in ("cpu", "cuda")
}

_kept: dict[Kind, Steps] = {}
_NOTHING: tuple[Kind, Steps | None] = ((), None)
_latest = _NOTHING
"""The kind that was found last, and what was kept of it."""


def are_numbers(types: Iterable[type]) -> bool:
    """True where a kind can be told by values of these types: callers may pass anything."""
    return _NUMBERS.issuperset(types)


def kind_of(tensors: Iterable[Tensor | None], numbers: tuple[Any, ...]) -> tuple[Kind, Addresses]:
    """All that decides what a call launches and whether it is refused; and where its tensors lie."""
    tensors = tuple(tensors)
    types = (*map(type, tensors), *map(type, numbers))
    return kind_of_present([x for x in tensors if x is not None], numbers, types)


def kind_of_present(
    given: Collection[Tensor], numbers: tuple[Any, ...], types: tuple[type, ...]
) -> tuple[Kind, Addresses]:
    """The same of those tensors alone that there are, with the types of all tensors, then of the numbers.

    Functions in C go through the tensors, where Python would take half as long again.
    """
    addresses = [*map(_address_of, given)]
    aligned = functools.reduce(operator.or_, addresses, 0) % ALIGNMENT == 0
    kind = (
        # Which tensors there are; and 1 == 1.0 == True is not what the checks say of numbers.
        types,
        numbers,
        (*map(_facts_with_grad if _is_grad_recorded() else _facts, given),),
        (*map(_strides, given),),
        aligned or tuple(address % ALIGNMENT == 0 for address in addresses),
        ON_ROCM and tuple(x.untyped_storage().size() < NEAR for x in given),
    )
    return kind, addresses


def places_of(kind: Kind, tensors: int) -> list[int]:
    """For each of the tensors of such a call, where its address stands among all.

    -1 of a tensor that it lacks: kernels got None in its place, so nobody asks for its address.
    """
    present = [x is not type(None) for x in kind[0][:tensors]]
    return [sum(present[:number]) if present[number] else -1 for number in range(tensors)]


def find(kind: Kind) -> Steps | None:
    """What was kept of a call of this kind: takes the addresses of another, returns its result."""
    global _latest  # noqa: PLW0603 - it is part of what is kept
    latest, steps = _latest
    if latest == kind:  # layers and steps mostly repeat what was just done, and this takes half of a look-up
        return steps
    found = _kept.get(kind)
    if found is not None:
        _latest = kind, found
    return found


def keep(kind: Kind, steps: Steps) -> None:
    """Remember how to make calls of this kind."""
    global _latest  # noqa: PLW0603 - likewise
    if len(_kept) >= MAX_KEPT:
        _kept.clear()
    _kept[kind] = steps
    _latest = kind, steps


def forget() -> None:
    """Make the next call of every kind as if it were the first."""
    global _latest  # noqa: PLW0603 - likewise
    _kept.clear()
    _latest = _NOTHING


class Layout(NamedTuple):
    """What a tensor looks like that is made for each call."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """As of this one."""
        return cls(tuple(x.shape), x.stride(), x.dtype)


def maker(device: torch.device) -> Maker:
    """Makes tensors without contents on the current device of this type, by layout.

    For generated code PyTorch has functions that ask nothing but the allocator, in half the time of
    ``torch.empty``. They leave memory as it is where deterministic algorithms are asked for. They are
    PyTorch's own affair: a version without them has the plain way.
    """
    return _QUICK.get(device.type) or filling_maker(device)


def filling_maker(device: torch.device) -> Maker:
    """The same for deterministic algorithms, where PyTorch fills memory."""
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


OUT, LSE, PARTS, PART_LSE = -5, -4, -3, -2
"""Where these stand behind the addresses of a call's tensors; a stream is last."""


@dataclass(frozen=True, slots=True)
class AttentionSteps:
    """Launches of a call to attention, and the memory that they need."""

    launches: Launches
    make: Maker
    make_filled: Maker
    out: Layout
    lse: Layout | None = None
    """None where nobody asked for the LSE."""
    scratch: Layout | None = None
    """Parts and their LSEs, one behind the other; None where there is nothing to combine."""
    part_bytes: int = 0

    def __call__(self, addresses: Addresses) -> tuple[Tensor, Tensor | None]:
        """Out, and the LSE where it is asked for, of another call of the kind."""
        make = self.make_filled if _is_deterministic() else self.make
        out = make(*self.out)
        lse, lse_address = None, None
        if self.lse is not None:
            lse = make(*self.lse)
            lse_address = lse.data_ptr()
        if self.scratch is None:
            self.launches([*addresses, out.data_ptr(), lse_address, None, None])
            return out, lse
        # One tensor for both: head_dim_v is a multiple of 8, so the second part is aligned as the first.
        scratch = make(*self.scratch)
        parts = scratch.data_ptr()
        self.launches([*addresses, out.data_ptr(), lse_address, parts, parts + self.part_bytes])
        return out, lse


def attention_sources(kind: Kind, combined: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each ``*_ptr`` of an attention kernel and of the combine, where in such a call it comes from."""
    q, k, v, seqlens, table, batch_idx, leftpad, mask, cu_q, alibi, sinks = places_of(kind, 11)
    written = (PARTS, PART_LSE) if combined else (OUT, LSE)
    return (
        (q, k, v, *written, seqlens, leftpad, mask, batch_idx, table, cu_q, alibi, sinks, OUT, LSE),
        (PARTS, PART_LSE, OUT, LSE, seqlens, leftpad, cu_q),
    )


@dataclass(frozen=True)
class AppendSteps:
    """The launch of an append."""

    launches: Launches

    def __call__(self, addresses: Addresses) -> None:
        """Write the tokens of another call of the kind."""
        self.launches([*addresses])


def append_sources(kind: Kind) -> tuple[int, ...]:
    """For each ``*_ptr`` of the append kernel, where in such a call it comes from."""
    k, v, k_cache, v_cache, seqlens, table, batch_idx, q, q_rotated, cos, sin = places_of(kind, 11)
    return (k, v, q, k_cache, v_cache, q_rotated, cos, sin, seqlens, batch_idx, table)
