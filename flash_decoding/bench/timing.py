"""Timing: rotated calls, several contenders in turn, medians.

A :class:`Burst` runs a contender's calls and says what one of them took. :func:`measure` runs the bursts of
all contenders in turn, so that clocks, temperature and neighbours drift for all of them alike.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Call = Callable[[], Tensor]


class Burst(Protocol):
    """Some calls of one contender, run together and timed as a whole."""

    @property
    def calls(self) -> int:
        """How many calls a launch makes."""

    def launch(self) -> Callable[[], float]:
        """Start the calls; what comes back waits for them and returns seconds per call."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    budget_s: float
    """Time for one contender, after which it takes no more samples than the fewest."""
    min_samples: int = 5
    max_samples: int = 200
    warmups: int = 3
    """Launches of each contender that are thrown away first, within the budget."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the samples of one contender."""

    median_s: float
    p10_s: float
    p90_s: float
    samples: int
    calls_per_sample: int

    @classmethod
    def of(cls, samples: Sequence[float], calls_per_sample: int) -> Timing:
        """Summarise samples (seconds per call each)."""
        return cls(
            median_s=quantile(samples, 0.5),
            p10_s=quantile(samples, 0.1),
            p90_s=quantile(samples, 0.9),
            samples=len(samples),
            calls_per_sample=calls_per_sample,
        )


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def measure(bursts: Mapping[str, Burst], effort: Effort) -> dict[str, Timing]:
    """Launch all bursts in turn, round after round, until each has spent its budget.

    A contender leaves the rounds when its budget is spent (and it has the fewest samples wanted) or when it
    has the most samples wanted; the others go on.
    """
    _warm_up(bursts, effort)
    samples: dict[str, list[float]] = {name: [] for name in bursts}
    running = dict(bursts)
    while running:
        for name, seconds in _round(running).items():
            samples[name].append(seconds)
        running = {n: b for n, b in running.items() if not _is_done(samples[n], b.calls, effort)}
    return {name: Timing.of(taken, bursts[name].calls) for name, taken in samples.items()}


def _warm_up(bursts: Mapping[str, Burst], effort: Effort) -> None:
    """Rounds whose times are not kept; slow contenders leave early, after their budget."""
    spent = dict.fromkeys(bursts, 0.0)
    for _ in range(effort.warmups):
        cold = {name: burst for name, burst in bursts.items() if spent[name] < effort.budget_s}
        for name, seconds in _round(cold).items():
            spent[name] += seconds * bursts[name].calls


def _round(bursts: Mapping[str, Burst]) -> dict[str, float]:
    """One launch of each, all launched before the first is waited for: a GPU stays busy in between."""
    started = {name: burst.launch() for name, burst in bursts.items()}
    return {name: read() for name, read in started.items()}


def _is_done(samples: list[float], calls: int, effort: Effort) -> bool:
    if len(samples) >= effort.max_samples:
        return True
    return len(samples) >= effort.min_samples and sum(samples) * calls >= effort.budget_s


class HostBurst:
    """One call, timed by the host's clock: for a CPU. Each launch takes the next input set."""

    calls = 1

    def __init__(self, calls: Sequence[Call], clock: Callable[[], float] = time.perf_counter) -> None:
        self._turn = itertools.cycle(calls)
        self._clock = clock

    def launch(self) -> Callable[[], float]:
        """Make the next set's call, start to end."""
        call = next(self._turn)
        before = self._clock()
        call()
        elapsed = self._clock() - before
        return lambda: elapsed


class DeviceBurst:
    """Work on the current stream between two device events: a graph's replay, or calls made one by one."""

    def __init__(self, run: Callable[[], object], calls: int) -> None:
        self._run, self.calls = run, calls

    def launch(self) -> Callable[[], float]:
        """Queue the calls between two events; what comes back waits for the second."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        self._run()
        after.record()

        def read() -> float:
            after.synchronize()
            return float(before.elapsed_time(after)) / 1000 / self.calls

        return read
