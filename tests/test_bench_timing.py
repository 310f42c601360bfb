"""Timing: medians, turns, budgets, with a clock that does what the test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from flash_decoding.bench.capture import make_ready
from flash_decoding.bench.timing import Effort, HostBurst, Timing, measure, quantile


class FakeBurst:
    """Takes as long as it is told, and notes when it was launched."""

    def __init__(self, name: str, seconds: list[float], log: list[str], calls: int = 1) -> None:
        self.name, self.calls, self._log = name, calls, log
        self._seconds = itertools.cycle(seconds)

    def launch(self) -> Callable[[], float]:
        self._log.append(self.name)
        seconds = next(self._seconds)
        return lambda: seconds


@pytest.mark.parametrize(
    ("values", "fraction", "wanted"),
    [
        ([3.0], 0.5, 3.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([0.0, 10.0], 0.1, 1.0),
        (list(range(11)), 0.9, 9.0),
    ],
)
def test_quantiles_interpolate(values: list[float], fraction: float, wanted: float) -> None:
    assert quantile(values, fraction) == pytest.approx(wanted)


def test_one_slow_sample_does_not_move_the_median() -> None:
    timing = Timing.of([1.0, 1.0, 100.0, 1.0, 1.0], calls_per_sample=4)
    assert (timing.median_s, timing.samples, timing.calls_per_sample) == (1.0, 5, 4)
    assert timing.p90_s > timing.median_s >= timing.p10_s


def test_contenders_take_turns() -> None:
    log: list[str] = []
    bursts = {name: FakeBurst(name, [1.0], log) for name in "ab"}
    measure(bursts, Effort(budget_s=3.0, min_samples=2, warmups=1))
    assert "".join(log) == "ab" * 4


def test_warm_ups_are_thrown_away() -> None:
    burst = FakeBurst("a", [9.0, 9.0, 9.0, 1.0, 1.0], [])
    timings = measure({"a": burst}, Effort(budget_s=100.0, min_samples=2, max_samples=2, warmups=3))
    assert timings["a"] == Timing(1.0, 1.0, 1.0, samples=2, calls_per_sample=1)


def test_a_slow_contender_leaves_first_and_warms_up_once() -> None:
    log: list[str] = []
    bursts = {"slow": FakeBurst("slow", [10.0], log), "fast": FakeBurst("fast", [1.0], log)}
    timings = measure(bursts, Effort(budget_s=5.0, min_samples=2, warmups=3))
    assert timings["slow"].samples == 2
    assert timings["fast"].samples == 5
    assert log.count("slow") == 1 + 2
    assert log.count("fast") == 3 + 5


def test_samples_have_an_upper_limit() -> None:
    timings = measure({"a": FakeBurst("a", [1e-9], [])}, Effort(budget_s=1.0, max_samples=7))
    assert timings["a"].samples == 7


def test_the_budget_counts_every_call_of_a_burst() -> None:
    timings = measure({"a": FakeBurst("a", [1.0], [], calls=10)}, Effort(budget_s=20.0, min_samples=1))
    assert (timings["a"].samples, timings["a"].calls_per_sample) == (2, 10)


def test_the_hosts_clock_is_read_around_each_call_and_sets_rotate() -> None:
    seen: list[int] = []
    ticks = iter([0.0, 2.0, 10.0, 13.0, 20.0, 24.0])

    def call(index: int) -> torch.Tensor:
        seen.append(index)
        return torch.zeros(())

    burst = HostBurst([lambda: call(0), lambda: call(1)], clock=lambda: next(ticks))
    assert [burst.launch()() for _ in range(3)] == [2.0, 3.0, 4.0]
    assert seen == [0, 1, 0]


@pytest.mark.gpu
def test_a_captured_call_is_replayed_on_every_set_and_its_output_is_kept(device: torch.device) -> None:
    sets = [torch.full((8,), float(i), device=device) for i in range(3)]
    counts = [torch.zeros((), device=device) for _ in sets]

    def calls(i: int) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            counts[i].add_(1)
            return sets[i] * 2

        return call

    ready = make_ready([calls(i) for i in range(3)], device)
    assert ready.note == ""
    for count in counts:
        count.zero_()
    sets[0].fill_(21.0)
    assert ready.burst.launch()() > 0
    assert ready.output is not None
    assert ready.output.tolist() == [42.0] * 8
    assert [int(count) for count in counts] == [ready.burst.calls // 3] * 3


@pytest.mark.gpu
def test_a_call_that_cannot_be_captured_is_timed_and_marked(device: torch.device) -> None:
    x = torch.ones(8, device=device)
    ready = make_ready([lambda: x * float(x.sum().item())], device)
    assert ready.note.startswith("not in a CUDA graph")
    assert ready.output is None
    assert ready.burst.launch()() > 0
