"""The read floor: every word is read once, and in the widest loads that there are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_decoding.bench.baselines import read_kernel
from flash_decoding.bench.baselines.floor import CPU_WAYS
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Truth
from flash_decoding.bench.column import Way
from flash_decoding.bench.inputs import Inputs, make_inputs
from tests.source_tree import ROOT

CPU = torch.device("cpu")
CASE = Case(batch=2, kv_len=1000, dtype=torch.bfloat16, device=CPU, heads_q=4, heads_kv=2, head_dim=32)


def small_words(device: torch.device) -> Inputs:
    """Keys and values made of small integers: Triton's interpreter sums them wider than a GPU would."""
    shape = (CASE.batch, CASE.kv_len, CASE.heads_kv, CASE.head_dim // 2)
    k, v = (torch.randint(1, 1000, shape, dtype=torch.int32, device=device) for _ in range(2))
    q = torch.zeros(CASE.batch, 1, CASE.heads_q, CASE.head_dim, dtype=CASE.dtype, device=device)
    lengths = torch.full((CASE.batch,), CASE.kv_len, dtype=torch.int32, device=device)
    return Inputs(q, k.view(CASE.dtype), v.view(CASE.dtype), lengths)


@pytest.mark.parametrize("shape", read_kernel.SHAPES, ids=lambda shape: shape.label)
def test_the_reading_kernel_reads_every_word_once(shape: read_kernel.Shape, device: torch.device) -> None:
    inputs = small_words(device)
    sums = read_kernel.read(inputs.k, inputs.v, shape, sm_count=2)
    truth = Truth(CASE, inputs, torch.zeros(1), torch.zeros(1), 0.0)
    assert truth.judge("floor", sums).passed
    assert not truth.judge("floor", sums[1:]).passed


@pytest.mark.parametrize("way", CPU_WAYS, ids=lambda way: way.label)
def test_the_sums_of_a_cpu_cover_every_word(way: Way) -> None:
    inputs = make_inputs(CASE, seed=0)
    truth = Truth.of(CASE, inputs)
    result = way.prepare(CASE, inputs)()
    assert truth.judge("floor", result).passed
    inputs.v[-1, -1, -1, -1] += 1
    assert not truth.judge("floor", result).passed


def test_the_reading_kernel_loads_16_bytes_at_a_time(tmp_path: Path) -> None:
    """In a process of its own: here Triton may be set to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.floor_compile", "sm_90", "gfx942"],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    shapes = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(shapes) == 2 * len(read_kernel.SHAPES)
    assert all(shapes)
    narrow = [name for loads in shapes for name in loads if not re.search(r"v4\.b32|async\.cg|dwordx4", name)]
    assert not narrow
