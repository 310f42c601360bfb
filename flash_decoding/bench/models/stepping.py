"""Greedy steps in a row, timed as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.models.column import Stepper
from flash_decoding.bench.timing import Burst, DeviceBurst, HostBurst


class StepBurst:
    """From the same filled cache each time: a step, the likeliest token, the next step with it."""

    def __init__(self, stepper: Stepper, case: ModelCase) -> None:
        self.calls = case.burst
        self._stepper = stepper
        self._tokens = torch.zeros(case.batch, 1, dtype=torch.int64, device=case.device)
        on_gpu = case.device.type == "cuda"
        self._timed: Burst = DeviceBurst(self._run, self.calls) if on_gpu else HostBurst((self._run,))

    def launch(self) -> Callable[[], float]:
        """Rewind, which is not timed, and start the steps; what comes back returns seconds per step."""
        self._stepper.rewind()
        read, steps = self._timed.launch(), self.calls // self._timed.calls
        return lambda: read() / steps

    def _run(self) -> Tensor:
        for _ in range(self.calls):
            self._tokens.copy_(self._stepper.step(self._tokens).argmax(-1))
        return self._tokens
