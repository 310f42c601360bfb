"""What the bench has to know about the device under it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

USUAL_CPU_CACHE = 32 << 20
"""Where the system does not tell: what a server's cores commonly share."""

FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
)
"""What a contender may raise where it is broken, built for something else, or refuses a shape."""


def failures(device: torch.device) -> tuple[type[Exception], ...]:
    """:data:`FAILURES`, and Triton's own errors on a GPU."""
    if device.type != "cuda":
        return FAILURES
    from triton.errors import TritonError

    return (*FAILURES, TritonError)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache_bytes(Path("/sys/devices/system/cpu/cpu0/cache"))


def _cpu_cache_bytes(folder: Path) -> int:
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    kibibytes = [int(size[:-1]) for size in sizes if size.endswith("K") and size[:-1].isdecimal()]
    return max(kibibytes, default=USUAL_CPU_CACHE >> 10) << 10


def release_memory(device: torch.device) -> None:
    """Give the memory of a finished row back, so that the next row finds all of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
