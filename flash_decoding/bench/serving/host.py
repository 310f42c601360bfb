"""What a call costs the host: its clock around eager calls, with a GPU that has next to nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from flash_decoding.bench.baselines import ours
from flash_decoding.bench.baselines.pytorch import SDPA_BY_ITSELF
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call
from flash_decoding.bench.inputs import make_inputs
from flash_decoding.bench.timing import quantile

BURST = 16
"""Calls between two waits for the device: few enough that its queue never fills."""

SAMPLES = 200


LENGTHS = (64, 128, 2048)
"""Keys of the calls: one tile, which is one launch of ours; two tiles and many, split, which are two."""


def tiny(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """Calls over in less time than the host needs to make them."""
    return [
        Case(batch=1, kv_len=length, heads_q=8, heads_kv=8, dtype=dtype, device=device) for length in LENGTHS
    ]


def host_times(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Microseconds of the host per eager call, medians: of ours and of PyTorch's, for each tiny case by name.

    Nothing without a GPU.
    """
    if device.type != "cuda":
        return {}
    return {case.name: per_call(_contenders(case), torch.cuda.synchronize) for case in tiny(device, dtype)}


def _contenders(case: Case) -> dict[str, Call]:
    inputs = make_inputs(case, seed=0)
    columns = {"decode_attention": ours.PLANNED, "scaled_dot_product_attention": SDPA_BY_ITSELF}
    return {name: column.ways[0].prepare(case, inputs) for name, column in columns.items()}


def per_call(
    calls: dict[str, Call],
    wait: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
    samples: int = SAMPLES,
) -> dict[str, float]:
    """Median microseconds of the host per call, all of them in turn.

    Args:
        calls: what is measured.
        wait: returns when the device is idle.
        clock: seconds.
        samples: bursts of each that count; half as many are thrown away first.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples + samples // 2):
        for name, call in calls.items():
            wait()
            taken[name].append(_burst(call, clock))
    wait()
    return {name: quantile(seconds[-samples:], 0.5) * 1e6 for name, seconds in taken.items()}


def _burst(call: Callable[[], Tensor], clock: Callable[[], float]) -> float:
    before = clock()
    for _ in range(BURST):
        call()
    return (clock() - before) / BURST
