"""The read floor: every word is read once, and in the widest loads that there are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_decoding.bench.baselines import read_kernel, read_kernel_runs
from flash_decoding.bench.baselines.floor import CPU_WAYS
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Truth
from flash_decoding.bench.column import Way
from flash_decoding.bench.inputs import Inputs, make_inputs, runs_of
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


WIDE = re.compile(r"v4\.b32|async\.cg|dwordx4")


def compiled(tmp_path: Path, *targets: str) -> list[dict[str, int]]:
    """Loads of both kernels in all shapes, in a process of its own: here Triton may be set to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.floor_compile", *targets],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return [json.loads(line) for line in ran.stdout.splitlines()]


def wide(loads: dict[str, int]) -> int:
    return sum(count for name, count in loads.items() if WIDE.search(name))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_reading_kernels_load_16_bytes_at_a_time(target: str, tmp_path: Path) -> None:
    """The kernel that reads runs loads their table, too; its keys and values come as wide as the other's."""
    lines = compiled(tmp_path, target)
    count = len(read_kernel.SHAPES)
    whole, runs = lines[:count], lines[count:]
    assert [wide(loads) for loads in runs] == [wide(loads) for loads in whole]
    assert all(whole)
    assert [sum(loads.values()) for loads in whole] == [wide(loads) for loads in whole]


IN_PIECES = {
    "ragged pages": replace(CASE, kv_len=50, lengths=(1, 50), page_size=16),
    "whole pages": replace(CASE, kv_len=32, lengths=(16, 32), page_size=16),
    "a window": replace(CASE, kv_len=100, window=30),
    "a window over pages": replace(CASE, kv_len=100, lengths=(20, 100), page_size=16, window=30),
    "drafts behind a window": replace(CASE, kv_len=100, window=30, q_len=3),
}


@pytest.mark.parametrize("case", IN_PIECES.values(), ids=IN_PIECES)
def test_runs_are_what_somebody_sees(case: Case) -> None:
    """Each slot once, told by the values that lie there."""
    inputs = make_inputs(case, seed=0)
    flat = inputs.v.flatten(0, 1)
    runs = torch.cat([flat[first : first + slots] for first, slots in runs_of(case, inputs)])
    seen = torch.cat([inputs.seen(case, b)[1] for b in range(case.batch)])
    assert torch.equal(runs, seen)
    assert 2 * runs.numel() * runs.element_size() == case.kv_bytes


@pytest.mark.parametrize("case", IN_PIECES.values(), ids=IN_PIECES)
@pytest.mark.parametrize("shape", [read_kernel.SHAPES[0], read_kernel.SHAPES[8]], ids=lambda s: s.label)
def test_the_kernel_for_runs_reads_them_once(
    shape: read_kernel.Shape, case: Case, device: torch.device
) -> None:
    drawn = make_inputs(replace(case, device=device), seed=0)
    small = torch.randint(1, 1000, (*drawn.k.shape[:-1], case.head_dim // 2), dtype=torch.int32)
    k, v = (words.to(device).view(case.dtype) for words in (small, small + 7))
    inputs = replace(drawn, k=k, v=v)
    blocks = read_kernel_runs.Blocks.of(case, inputs, shape.block)
    assert int(blocks.counts.sum()) * 8 == case.kv_bytes
    sums = read_kernel_runs.read(inputs, blocks, shape, sm_count=2)
    truth = Truth(case, inputs, torch.zeros(1), torch.zeros(1, 1), 0.0)
    assert truth.judge("floor", sums).passed
    assert not truth.judge("floor", torch.cat((sums, sums[:1]))).passed


@pytest.mark.parametrize("case", IN_PIECES.values(), ids=IN_PIECES)
@pytest.mark.parametrize("way", CPU_WAYS, ids=lambda way: way.label)
def test_the_sums_of_a_cpu_cover_pieces(way: Way, case: Case) -> None:
    inputs = make_inputs(case, seed=0)
    truth = Truth(case, inputs, torch.zeros(1), torch.zeros(1, 1), 0.0)
    call = way.prepare(case, inputs)
    assert truth.judge("floor", call()).passed
    before = call()
    first, _ = next(runs_of(case, inputs))
    inputs.k.view(torch.int32).flatten(0, 1)[first] += 1
    assert not torch.equal(call(), before)
