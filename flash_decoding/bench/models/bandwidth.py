"""The bandwidth that the bound is computed with: what a large copy reaches on this device, now."""

from __future__ import annotations

import torch

from flash_decoding.bench.timing import Burst, DeviceBurst, HostBurst

COPIES = 8
"""Copies, the fastest of which counts."""

COPIED_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
"""Size of the source; the target is as large."""


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes per second, read and written, of the fastest of some copies of ``size`` bytes."""
    source = torch.zeros(size or COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    burst: Burst = (
        DeviceBurst(lambda: target.copy_(source), 1)
        if device.type == "cuda"
        else HostBurst((lambda: target.copy_(source),))
    )
    fastest = min(burst.launch()() for _ in range(COPIES))
    return 2 * source.numel() / fastest
