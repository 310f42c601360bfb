"""Calls of a kind made before: what is one kind, what is another, and that a repetition computes its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import repeats


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    repeats.forget()
    yield
    repeats.forget()


def kind(*tensors: Tensor | None, numbers: tuple[Any, ...] = (1, 0.5)) -> repeats.Kind:
    return repeats.kind_of(tensors, numbers)[0]


def test_contents_and_addresses_do_not_make_a_kind() -> None:
    assert kind(torch.zeros(2, 8), None) == kind(torch.ones(2, 8), None)


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 8, dtype=torch.float16),
        torch.zeros(3, 8),
        torch.zeros(2, 16)[:, :8],
        torch.zeros(2, 8, device="meta"),
        torch.zeros(17)[1:].view(2, 8),
        torch.zeros(2, 8, requires_grad=True),
        None,
    ],
    ids=["dtype", "shape", "strides", "device", "alignment", "grad", "absent"],
)
def test_all_that_decides_a_launch_makes_a_kind(other: Tensor | None) -> None:
    assert kind(torch.zeros(2, 8)) != kind(other)


@pytest.mark.parametrize("other", [(1, 0.25), (1.0, 0.5), (True, 0.5), (1, 0.5, None)])
def test_numbers_and_their_types_make_a_kind(other: tuple[Any, ...]) -> None:
    x = torch.zeros(2, 8)
    assert kind(x, numbers=(1, 0.5)) != kind(x, numbers=other)


def test_whether_grad_is_recorded_makes_a_kind() -> None:
    x: Tensor = torch.zeros(2, 8, requires_grad=True)
    with torch.no_grad():
        unrecorded = kind(x)
    assert kind(x) != unrecorded


def test_only_numbers_tell_a_kind() -> None:
    assert repeats.are_numbers(("a", None, True, 1, 0.5))
    assert not any(repeats.are_numbers((x,)) for x in ([1], torch.ones(()), {}))


def test_kinds_that_never_come_again_do_not_pile_up() -> None:
    for size in range(2 * repeats.MAX_KEPT):
        repeats.keep((size,), lambda addresses: None)
    last = 2 * repeats.MAX_KEPT - 1
    assert repeats.find((last,)) is not None
    kept = [size for size in range(last + 1) if repeats.find((size,)) is not None]
    assert len(kept) <= repeats.MAX_KEPT


def test_on_a_cpu_nothing_is_kept() -> None:
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 2, 16)
    fd.decode_attention(q, k, k)
    assert not repeats._kept


def attend(seed: int, device: str, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A call made of ``seed``, and what comes out of it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 1, 8, 64), (2, 4096, 2, 64), (2, 4096, 2, 64))
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes)
    lengths = torch.randint(1, 4097, (2,), generator=generator, dtype=torch.int32).to(device)
    out, lse = fd.decode_attention(q, k, v, cache_seqlens=lengths, return_lse=True)
    return (q, k, v, lengths), (out, lse)


@pytest.mark.gpu
def test_a_repeated_call_gives_the_bits_of_a_first_one() -> None:
    attend(0, "cuda", torch.bfloat16)
    _, repeated = attend(1, "cuda", torch.bfloat16)
    assert repeats._kept
    repeats.forget()
    _, first = attend(1, "cuda", torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(repeated, first, strict=True))


@pytest.mark.gpu
def test_a_repeated_append_writes_and_counts_its_version() -> None:
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    for _ in range(3):
        k = torch.randn(2, 1, 2, 64, device="cuda", dtype=torch.float16)
        caches = [torch.zeros(2, 16, 2, 64, device="cuda", dtype=torch.float16) for _ in range(2)]
        before = [cache._version for cache in caches]
        fd.append_kv(k, 2 * k, *caches, cache_seqlens=lengths)
        assert torch.equal(caches[0][:, :1], k)
        assert torch.equal(caches[1][:, :1], 2 * k)
        assert all(cache._version > old for cache, old in zip(caches, before, strict=True))


@pytest.mark.gpu
def test_what_was_kept_holds_no_memory() -> None:
    attend(0, "cuda", torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for seed in range(3):
        attend(seed, "cuda", torch.bfloat16)
    assert torch.cuda.memory_allocated() == before
