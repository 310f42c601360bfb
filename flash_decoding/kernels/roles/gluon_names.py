"""What Gluon has had more than one name for; it is experimental, and changes from one Triton to the next."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Threads of a group of warps wait for each other. The second until Triton 3.6."""

async_load = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)
"""A tile from memory into shared memory, without a wait. The second until Triton 3.7."""
