"""Calls that nobody but the library takes part in, and those that somebody else has to see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_decoding import eager, settings


class Subclass(Tensor):
    """A tensor that could do anything."""


@pytest.fixture(autouse=True)
def on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of here is all but the device."""
    monkeypatch.setattr(eager, "is_on_current_gpu", lambda x: True)


def tensors(x: Any) -> tuple[Any, ...]:
    return (torch.zeros(2), None, x)


@pytest.mark.parametrize("x", [torch.zeros(3), torch.nn.Parameter(torch.zeros(3)), None])
def test_plain_tensors_are_alone(x: Tensor | None) -> None:
    assert eager.is_alone(tensors(x))


@pytest.mark.parametrize("x", [torch.zeros(3).as_subclass(Subclass), 5, [1.0], "k"])
def test_whatever_else_a_caller_passes_is_not(x: Any) -> None:
    assert not eager.is_alone(tensors(x))


def test_a_call_without_queries_is_not() -> None:
    assert not eager.is_alone((None, torch.zeros(3)))


@pytest.mark.parametrize("types", [(Tensor, type(None)), (torch.nn.Parameter,)])
def test_tensors_and_none_are_plain(types: tuple[type, ...]) -> None:
    assert eager.are_plain(types)
    assert not eager.are_plain((*types, Subclass))
    assert not eager.are_plain((*types, int))


@pytest.mark.parametrize("everyday", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_everyday_contexts_change_nothing(everyday: Callable[[], AbstractContextManager[None]]) -> None:
    with everyday():
        assert eager.is_alone(tensors(None))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nor_does_autocast_which_has_no_rule_for_us(device: str) -> None:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cpu" or torch.cuda.is_available()):
        assert eager.is_alone(tensors(None))


@pytest.mark.parametrize(
    "watcher",
    [
        TorchDispatchMode,
        TorchFunctionMode,
        FakeTensorMode,
        torch.profiler.profile,
        settings.checking,
        lambda: torch.device("cpu"),
    ],
    ids=["dispatch", "function", "fake", "profiler", "checking", "default_device"],
)
def test_whoever_watches_sees_an_operator(watcher: Callable[[], AbstractContextManager[None]]) -> None:
    given = tensors(None)
    with watcher():
        alone = eager.is_alone(given)
    assert not alone
    assert eager.is_alone(given)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize])
def test_transforms_see_an_operator(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(eager.is_alone((x,)))
        return x.sum()

    transform(inner)(torch.zeros(3))
    assert seen == [False]


def test_tracers_see_an_operator() -> None:
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(eager.is_alone((x,)))
        return x + 1

    torch.fx.experimental.proxy_tensor.make_fx(inner)(torch.zeros(3))
    assert seen == [False]


def test_compilers_see_an_operator() -> None:
    compiled = torch.compile(lambda x: x + eager.is_alone((x,)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(3)), torch.zeros(3))


def test_a_cpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not eager.is_alone((torch.zeros(3),))


@pytest.mark.gpu
def test_another_gpu_than_the_current_one_is_switched_to_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.zeros(3, device="cuda")
    assert eager.is_alone((x,))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: x.get_device() + 1)
    assert not eager.is_alone((x,))
