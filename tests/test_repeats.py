"""Calls of a kind made before: what is one kind, what is another, and that a repetition computes its own."""

from __future__ import annotations

from collections.abc import Callable
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
    assert repeats.are_numbers(map(type, ("a", None, True, 1, 0.5)))
    others: tuple[Any, ...] = ([1], torch.ones(()), {})
    assert not any(repeats.are_numbers((type(x),)) for x in others)


def test_kinds_that_never_come_again_do_not_pile_up() -> None:
    for size in range(2 * repeats.MAX_KEPT):
        repeats.keep((size,), lambda addresses: None)
    last = 2 * repeats.MAX_KEPT - 1
    assert repeats.find((last,)) is not None
    kept = [size for size in range(last + 1) if repeats.find((size,)) is not None]
    assert len(kept) <= repeats.MAX_KEPT


def test_tensors_at_other_places_make_a_kind() -> None:
    x = torch.zeros(2, 8)
    assert kind(x, x, None) != kind(x, None, x)


def test_a_kind_knows_where_the_addresses_of_its_tensors_stand() -> None:
    x, y = torch.zeros(2, 8), torch.zeros(3)
    found, addresses = repeats.kind_of((None, x, None, y), (1,))
    assert addresses == [x.data_ptr(), y.data_ptr()]
    assert repeats.places_of(found, 4) == [-1, 0, -1, 1]


def test_a_kind_is_found_however_many_came_between() -> None:
    kinds = [kind(torch.zeros(size)) for size in range(1, 4)]
    kept = [lambda addresses, size=size: size for size in range(1, 4)]
    for one, steps in zip(kinds, kept, strict=True):
        repeats.keep(one, steps)
    for number in (0, 0, 1, 0, 2, 2, 1):
        assert repeats.find(kinds[number]) is kept[number]
    assert repeats.find(kind(torch.zeros(9))) is None
    repeats.forget()
    assert not any(repeats.find(one) for one in kinds)


def test_what_is_kept_anew_is_found() -> None:
    one = kind(torch.zeros(3))
    for steps in (lambda addresses: 1, lambda addresses: 2):
        repeats.keep(one, steps)
        assert repeats.find(one) is steps


@pytest.mark.parametrize("make", [repeats.maker, repeats.filling_maker])
@pytest.mark.parametrize("inference", [False, True])
def test_results_are_made_like_a_layout(
    device: torch.device, make: Callable[[torch.device], repeats.Maker], inference: bool
) -> None:
    theirs = torch.zeros(1, 3, 1, 8, dtype=torch.float16, device=device)
    with torch.inference_mode(inference):
        ours = make(theirs.device)(*repeats.Layout.of(theirs))
    assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert ours.device == theirs.device
    assert ours.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    assert (ours.is_inference(), ours.requires_grad) == (inference, False)


def test_where_memory_is_to_be_filled_it_is() -> None:
    layout = repeats.Layout((4, 8), (8, 1), torch.float32)
    assert repeats.filling_maker(torch.device("cpu"))(*layout).isnan().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_fill_memory_where_that_is_asked_for(deterministic: bool) -> None:
    made: list[str] = []

    def maker(name: str) -> repeats.Maker:
        def make(shape: tuple[int, ...], *_: object) -> Tensor:
            made.append(name)
            return torch.zeros(shape)

        return make

    layout = repeats.Layout((1, 1, 1, 8), (8, 8, 8, 1), torch.float32)
    heard: list[list[int | None]] = []
    steps = repeats.AttentionSteps(
        heard.append, maker("as it is"), maker("filled"), layout, lse=layout, scratch=layout, part_bytes=16
    )
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    out, lse = steps([5, 6, 7])
    assert lse is not None
    assert made == ["filled" if deterministic else "as it is"] * 3
    assert heard[0][:5] == [5, 6, 7, out.data_ptr(), lse.data_ptr()]
    parts, part_lse = heard[0][5:]
    assert parts is not None
    assert part_lse == parts + 16


def test_on_a_cpu_nothing_is_kept() -> None:
    q, k = torch.randn(1, 1, 2, 16), torch.randn(1, 8, 2, 16)
    fd.decode_attention(q, k, k)
    assert not repeats._kept


@pytest.mark.parametrize("quick", [True, False])
def test_memory_comes_from_pytorch_with_its_quick_functions_and_without(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        monkeypatch.setattr(repeats, "_QUICK", {"cpu": None})
    made = repeats.maker(torch.device("cpu"))((2, 3), (3, 1), torch.float16)
    assert (made.shape, made.stride(), made.dtype) == ((2, 3), (3, 1), torch.float16)
