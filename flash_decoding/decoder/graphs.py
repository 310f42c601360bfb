"""One CUDA graph for each q_len, right for all lengths."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE
    from transformers import PreTrainedModel

Forward = Callable[[Tensor], Tensor]


def why_not(model: PreTrainedModel) -> tuple[str, ...]:
    """Reasons why a model's steps cannot be captured; none if they can."""
    experts = model._can_set_experts_implementation() and model.config._experts_implementation
    checks = (
        (model.device.type != "cuda", f"it is on {model.device}, and CUDA graphs need a GPU"),
        (
            experts == "eager",
            'the host looks for experts; model.set_experts_implementation("batched_mm") ends that',
        ),
    )
    return tuple(reason for fails, reason in checks if fails)


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Python's collector waits: were it to end a graph that nobody needs, no capture would survive it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, eq=False)
class Captured:
    """A forward that can be replayed: what it reads its tokens from, and where its logits appear."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    logits: Tensor


class Graphs:
    """Runs a forward by replaying what it launched before.

    The first forward of a q_len runs as it is, and compiles its kernels; the second one is captured.

    Args:
        forward: (rows, q_len) tokens to (rows, q_len, vocabulary) logits; works on tensors that never move,
            and waits for nothing.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._captured: dict[int, Captured] = {}
        self._warm: set[int] = set()
        self._pool: _POOL_HANDLE | None = None

    def run(self, tokens: Tensor) -> Tensor:
        """The forward of these tokens; its result is overwritten by the next one of this q_len.

        Args:
            tokens: (rows, q_len) on the GPU.
        """
        q_len = tokens.shape[1]
        if q_len not in self._warm:
            self._warm.add(q_len)
            return self._warm_up(tokens)
        captured = self._captured.get(q_len)
        if captured is None:
            self._captured[q_len] = captured = self._capture(tokens)
        captured.tokens.copy_(tokens)
        captured.graph.replay()
        return captured.logits

    def _warm_up(self, tokens: Tensor) -> Tensor:
        """A forward on a side stream, as a capture wants one before it."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            logits = self._forward(tokens)
        current.wait_stream(side)
        return logits

    def _capture(self, tokens: Tensor) -> Captured:
        graph, place = torch.cuda.CUDAGraph(), tokens.clone()
        with nothing_collected(), torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(place)
        self._pool = graph.pool()
        return Captured(graph, place, logits)
