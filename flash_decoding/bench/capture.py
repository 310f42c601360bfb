"""A contender's calls as a CUDA graph, so that what is timed is the device and not the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.bench.timing import Burst, Call, DeviceBurst, HostBurst

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

BURST_SECONDS = 2e-3
"""A replay should take at least this long: the launch of a graph, a few microseconds, then does not count."""

MAX_ROUNDS = 64


@dataclass(frozen=True, eq=False)
class Ready:
    """A contender that can be timed."""

    burst: Burst
    calls: Sequence[Call]
    """Kept alive: a graph replays addresses, and what lies there belongs to the calls that were captured."""
    output: Tensor | None = None
    """What a capture's first call, on the first input set, writes at each launch."""
    note: str = ""
    """Why the calls are timed without a graph, where they are."""


def make_ready(calls: Sequence[Call], device: torch.device) -> Ready:
    """Wrap calls, one per input set, in the burst that fits the device."""
    if device.type != "cuda":
        return Ready(HostBurst(calls), calls)
    _warm_up(calls)
    pool = torch.cuda.graph_pool_handle()
    try:
        _refuse_to_wait(calls[0])
        # A capture that fails leaves its own stream current: the outer context puts ours back.
        with torch.cuda.stream(torch.cuda.current_stream()):
            return _captured(calls, pool)
    except RuntimeError as error:  # what PyTorch raises where a call does what a capture forbids
        torch.cuda.synchronize()
        _close(pool)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return _uncaptured(calls, f"not in a CUDA graph, host time included: {reason}")


def _warm_up(calls: Sequence[Call]) -> None:
    """Run every call on a side stream, as a capture wants it; compilation and set-up happen here."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def _refuse_to_wait(call: Call) -> None:
    """Raise RuntimeError where a call waits for the device: found before a capture, it breaks nothing."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _close(pool: _POOL_HANDLE) -> None:
    """End the allocations of a capture that failed.

    Before 2.12 PyTorch leaves them open, refuses to release memory from then on, and so to capture again.
    """
    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


def _captured(calls: Sequence[Call], pool: _POOL_HANDLE) -> Ready:
    """A graph of all sets, repeated until a replay takes long enough to be timed well."""
    once = _capture(calls, 1, pool)
    once.burst.launch()()
    seconds = once.burst.launch()() * len(calls)
    rounds = min(math.ceil(BURST_SECONDS / max(seconds, 1e-9)), MAX_ROUNDS)
    return once if rounds <= 1 else _capture(calls, rounds, pool)


def _capture(calls: Sequence[Call], rounds: int, pool: _POOL_HANDLE) -> Ready:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = calls[0]()
        for call in itertools.islice(itertools.cycle(calls), 1, rounds * len(calls)):
            call()
    return Ready(DeviceBurst(graph.replay, len(calls) * rounds), calls, output)


def _uncaptured(calls: Sequence[Call], note: str) -> Ready:
    def run() -> None:
        for call in calls:
            call()

    return Ready(DeviceBurst(run, len(calls)), calls, note=note)
