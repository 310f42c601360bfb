"""``torch.compile`` and ``torch.export``: no graph breaks, few graphs, caches written in place."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flash_decoding as fd
from flash_decoding.flash_attn import flash_attn_with_kvcache

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_calls_work_as_the_first_of_a_process(backend: str, device: str) -> None:
    command = [sys.executable, "-m", "tests.compile_first_call", backend, device]
    root = Path(__file__).parent.parent
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stderr


def tokens(batch: int, capacity: int, device: str) -> dict[str, Any]:
    shapes = {"q": (1, 4), "k": (1, 2), "v": (1, 2), "k_cache": (capacity, 2), "v_cache": (capacity, 2)}
    return {name: torch.randn(batch, *shape, 16, device=device) for name, shape in shapes.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_a_loop_over_int_lengths_compiles_twice(device: str) -> None:
    """Once for the first length, once for any: PyTorch takes a number for fixed until it changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend=counter)
    arguments = tokens(2, 24, device)
    caches = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    for length in range(20):
        compiled = step(**arguments, cache_seqlens=length, causal=True)
        eager = flash_attn_with_kvcache(**(arguments | caches), cache_seqlens=length, causal=True)
        assert isinstance(eager, Tensor)
        assert isinstance(compiled, Tensor)
        assert torch.equal(compiled, eager)
    assert torch.equal(arguments["k_cache"], caches["k_cache"])
    assert counter.frame_count <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_lengths_on_the_device_compile_once_and_sizes_become_dynamic(device: str) -> None:
    """Batch and capacity cost a graph for the first size, one for all others, one for a batch of 1."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(fd.decode_attention, fullgraph=True, backend=counter)
    counts = []
    for batch, capacity in ((2, 16), (2, 16), (3, 32), (5, 48), (1, 48)):
        x = tokens(batch, capacity, device)
        lengths = torch.randint(1, capacity, (batch,), dtype=torch.int32, device=device)
        call = {name: x[name] for name in ("q", "k_cache", "v_cache")} | {"cache_seqlens": lengths}
        compiled, eager = attend(**call), fd.decode_attention(**call)
        assert isinstance(eager, Tensor)
        assert isinstance(compiled, Tensor)
        assert torch.equal(compiled, eager)
        counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 3]


class Step(torch.nn.Module):
    """One decoding step, as a model would export it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        k_cache, v_cache, lengths = cache
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)
        assert isinstance(out, Tensor)
        return out


def test_export_keeps_the_operators_and_a_dynamic_batch() -> None:
    def arguments(*lengths: int) -> tuple[Any, ...]:
        q, k, v, *caches = tokens(len(lengths), 16, "cpu").values()
        return q, k, v, (*caches, torch.tensor(lengths, dtype=torch.int32))

    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = (dynamic, dynamic, dynamic, (dynamic, dynamic, dynamic))
    program = torch.export.export(Step(), arguments(3, 9), dynamic_shapes=shapes)
    called = [str(node.target) for node in program.graph.nodes if "flash_decoding" in str(node.target)]
    assert called == ["flash_decoding.append_kv.default", "flash_decoding.attention.default"]
    *new, cache = arguments(0, 1, 9, 15, 3)
    copy = tuple(x.clone() for x in cache)
    assert torch.equal(program.module()(*new, cache), Step()(*new, copy))
    assert all(torch.equal(x, y) for x, y in zip(cache, copy, strict=True))
