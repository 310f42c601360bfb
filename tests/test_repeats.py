"""Calls of a kind made before: what is one kind, what is another, and that a repetition computes its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import repeats


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
    x = torch.ones(2, 8)
    assert kind(x, numbers=(1, 0.5)) != kind(x, numbers=other)


def test_whether_grad_is_recorded_makes_a_kind() -> None:
    recorded = kind(torch.zeros(2, 8, requires_grad=True))
    with torch.no_grad():
        assert kind(torch.zeros(2, 8, requires_grad=True)) != recorded


@pytest.mark.parametrize("rocm", [False, True])
def test_so_does_the_size_of_a_storage_on_rocm_alone(monkeypatch: pytest.MonkeyPatch, rocm: bool) -> None:
    monkeypatch.setattr(repeats, "ON_ROCM", rocm)
    small, large = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    assert (kind(small[:8]) != kind(large[:8])) == rocm


def test_only_numbers_tell_a_kind() -> None:
    assert repeats.are_numbers(("a", None, True, 1, 0.5))
    others: tuple[Any, ...] = ([1], torch.ones(()), {})
    assert not any(repeats.are_numbers((x,)) for x in others)


def test_kinds_that_never_come_again_do_not_pile_up() -> None:
    for size in range(2 * repeats.MAX_KEPT):
        repeats.keep((size,), lambda addresses: None)
    last = 2 * repeats.MAX_KEPT - 1
    assert repeats.find((last,)) is not None
    kept = [size for size in range(last + 1) if repeats.find((size,)) is not None]
    assert len(kept) <= repeats.MAX_KEPT


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_made_like_a_shell_that_holds_no_memory(inference: bool) -> None:
    repeats.shell.cache_clear()
    with torch.inference_mode(inference):
        shell = repeats.shell((1, 3, 1, 8), torch.float16, torch.device("cpu"))
    assert shell.untyped_storage().nbytes() == 0
    ours, theirs = torch.empty_like(shell), torch.empty(1, 3, 1, 8, dtype=torch.float16)
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    assert not ours.is_inference()
    assert ours.isnan().all()  # as of all new memory in tests
    with torch.inference_mode():
        assert torch.empty_like(shell).is_inference()


def test_on_a_cpu_nothing_is_kept() -> None:
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 2, 16)
    fd.decode_attention(q, k, k)
    assert not repeats._kept
