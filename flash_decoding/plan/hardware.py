"""Hardware as a value: the planner never asks a device anything, so it plans for any GPU on any machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flash_decoding.errors import InvalidInput

GLUON = frozenset({(3, 6), (3, 7), (3, 8)})
"""Versions of Triton whose Gluon the kernels of warps with roles ran under; it is experimental there."""


@dataclass(frozen=True)
class Hardware:
    """What a plan depends on.

    Bandwidth is the vendor's figure for device memory, in bytes per second; ``smem_bytes`` is the shared
    memory that one program may take.
    """

    name: str
    backend: str
    """"cuda", "hip" or "cpu"."""
    sm_count: int
    smem_bytes: int
    capability: tuple[int, int]
    bandwidth: float
    l2_bytes: int = 0
    triton: tuple[int, int] = (3, 6)
    """Version of Triton that compiles for it."""

    @property
    def overlaps_launches(self) -> bool:
        """Programmatic dependent launch: a kernel may start before the one ahead of it has ended."""
        return self.backend == "cuda" and self.capability >= (9, 0)

    @property
    def multiplies_by_warpgroup(self) -> bool:
        """Matrix units that read shared memory: Hopper's, and those of Blackwell in data centres."""
        return self.backend == "cuda" and self.capability[0] in (9, 10)

    @property
    def gives_warps_roles(self) -> bool:
        """Warps of one program can differ in code and registers, and Triton at hand knows how to say so."""
        return self.backend == "cuda" and self.capability == (9, 0) and self.triton in GLUON

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """Hardware of a device: the only place that queries one."""
        if device.type != "cuda":
            return CPU
        return _of_cuda(torch.cuda.current_device() if device.index is None else device.index)

    @classmethod
    def named(cls, name: str) -> Hardware:
        """Hardware by its common name, case and vendor aside ("H200", "NVIDIA A100")."""
        for hardware in PRESETS:
            if hardware.name.lower() in name.lower().split():
                return hardware
        raise InvalidInput("gpu", repr(name), "one of " + ", ".join(h.name for h in PRESETS))


_CACHE: dict[int, Hardware] = {}


def _of_cuda(index: int) -> Hardware:
    hardware = _CACHE.get(index)
    if hardware is None:
        hardware = _CACHE[index] = _query(torch.cuda.get_device_properties(index))
    return hardware


def _query(properties: torch._C._CudaDeviceProperties) -> Hardware:
    clock_hz = getattr(properties, "memory_clock_rate", 0) * 1000
    bus_bytes = getattr(properties, "memory_bus_width", 0) / 8
    known = next((h for h in PRESETS if h.name in properties.name.split()), None)
    bandwidth = known.bandwidth if known else 2.0 * clock_hz * bus_bytes
    return Hardware(
        name=properties.name,
        backend="hip" if torch.version.hip else "cuda",
        sm_count=properties.multi_processor_count,
        smem_bytes=getattr(properties, "shared_memory_per_block_optin", 65536),
        capability=(properties.major, properties.minor),
        bandwidth=bandwidth,
        l2_bytes=properties.L2_cache_size,
        triton=_triton_version(),
    )


def _triton_version() -> tuple[int, int]:
    """Major and minor version of Triton; (0, 0) without it."""
    try:
        import triton
    except ImportError:
        return 0, 0
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


KIB, MIB, TB = 1024, 1024**2, 1e12

PRESETS = (
    Hardware("A100", "cuda", 108, 163 * KIB, (8, 0), 2.039 * TB, 40 * MIB),
    Hardware("A10", "cuda", 72, 99 * KIB, (8, 6), 0.600 * TB, 6 * MIB),
    Hardware("RTX3090", "cuda", 82, 99 * KIB, (8, 6), 0.936 * TB, 6 * MIB),
    Hardware("L4", "cuda", 58, 99 * KIB, (8, 9), 0.300 * TB, 48 * MIB),
    Hardware("L40S", "cuda", 142, 99 * KIB, (8, 9), 0.864 * TB, 96 * MIB),
    Hardware("RTX4090", "cuda", 128, 99 * KIB, (8, 9), 1.008 * TB, 72 * MIB),
    Hardware("H100", "cuda", 132, 227 * KIB, (9, 0), 3.35 * TB, 50 * MIB),
    Hardware("H200", "cuda", 132, 227 * KIB, (9, 0), 4.8 * TB, 60 * MIB),
    Hardware("GH200", "cuda", 132, 227 * KIB, (9, 0), 4.9 * TB, 60 * MIB),
    Hardware("B200", "cuda", 148, 227 * KIB, (10, 0), 8.0 * TB, 126 * MIB),
    Hardware("RTX5090", "cuda", 170, 99 * KIB, (12, 0), 1.792 * TB, 96 * MIB),
    Hardware("MI300X", "hip", 304, 64 * KIB, (9, 4), 5.3 * TB, 256 * MIB),
)

CPU = Hardware("CPU", "cpu", 1, 0, (0, 0), 0.0)
