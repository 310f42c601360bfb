"""Compile the kernels for any GPU without one, and read what the compiler made of them.

Run as a script, in a process of its own, since the interpreter and the compiler exclude each other there:
``python -m tests.offline_compile TARGET...`` prints one JSON record per kernel compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flash_decoding import execute
from flash_decoding.kernels import append, linear
from flash_decoding.plan import Hardware, invariant_tiles, make_plan, roles
from flash_decoding.plan.linear import choose_linear_tile
from flash_decoding.projection import Norm, Projection
from flash_decoding.spec import KVCache, NewTokens, Options, Plan, Queries, Rotary

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "A100"),
    "sm_86": (GPUTarget("cuda", 86, 32), "RTX3090"),
    "sm_89": (GPUTarget("cuda", 89, 32), "RTX4090"),
    "sm_90": (GPUTarget("cuda", 90, 32), "H200"),
    "sm_100": (GPUTarget("cuda", 100, 32), "B200"),
    "sm_120": (GPUTarget("cuda", 120, 32), "RTX5090"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "MI300X"),
}

ROLES_TARGET = "sm_90"
"""The one that has warps with roles. Its attention is disassembled, which takes half a second for each."""

ATTENTION = {
    *("attend_kernel", "attend_balanced_kernel", "attend_fixed_kernel"),
    *("attend_roles_kernel", "balanced_roles_kernel"),
}


@dataclass(frozen=True)
class Case:
    """A compiled variant worth holding: what the library launches for it on each target."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    q_len: int = 1
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    head_dim_v: int = 128
    page_size: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    num_splits: int = 8
    runs: int = 0
    """Where > 0, work is shared across sequences by so many programs a head."""
    invariant: bool = False
    """Splits have a fixed size; where there are runs, these share them whole."""
    linear: bool = False
    """The linear layers of a step in place of its attention."""


CASES = (
    Case("balanced", runs=33),
    Case("balanced_paged_16", runs=33, page_size=16),
    Case("fixed", runs=33, invariant=True),
    Case("fixed_paged_16", runs=33, invariant=True, page_size=16),
    Case("fixed_head_dim_64", runs=33, invariant=True, head_dim=64, head_dim_v=64),
    Case("fixed_head_dim_256", runs=33, invariant=True, head_dim=256, head_dim_v=256),
    Case("splits", invariant=True),
    Case("splits_paged_16", invariant=True, page_size=16),
    Case("splits_head_dim_64", invariant=True, head_dim=64, head_dim_v=64),
    Case("splits_head_dim_256", invariant=True, head_dim=256, head_dim_v=256),
    Case("splits_fp32", invariant=True, dtype=torch.float32),
    Case("splits_verify_8_tokens", invariant=True, q_len=8, options=(("causal", True),)),
    Case("linear", linear=True),
    Case("decode_contiguous"),
    Case("decode_paged_16", page_size=16),
    Case("decode_paged_256", dtype=torch.float16, page_size=256),
    Case("decode_few_keys_a_split", num_splits=64),
    Case("decode_head_dim_64", head_dim=64, head_dim_v=64),
    Case("decode_head_dim_256", head_dim=256, head_dim_v=256),
    Case("decode_head_dim_192_128", head_dim=192, head_dim_v=128),
    Case("decode_fp32", dtype=torch.float32),
    Case("decode_masked", options=(("key_mask", True),)),
    Case("decode_paged_16_masked", page_size=16, options=(("key_mask", True),)),
    Case("verify_8_tokens", q_len=8, options=(("causal", True),)),
    Case("verify_8_tokens_head_dim_256", q_len=8, head_dim=256, head_dim_v=256, options=(("causal", True),)),
    Case("prefill", q_len=512, num_splits=1, options=(("causal", True),), page_size=16),
    Case(
        "prefill_head_dim_256",
        q_len=512,
        head_dim=256,
        head_dim_v=256,
        num_splits=1,
        options=(("causal", True),),
    ),
    Case("every_option", q_len=4, options=(("window_size", (128, 0)), ("softcap", 30.0), ("extras", True))),
)


class OfflineDriver:
    """Stands in for a GPU's driver: says which target to compile for, and has nothing to launch on."""

    def __init__(self, index: int, target: GPUTarget) -> None:
        self.index, self.target = index, target

    def get_current_device(self) -> int:
        """Index of the device; kernels are cached per device, so each target has its own."""
        return self.index

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self.target


def tensors(case: Case) -> tuple[Queries, KVCache, Options]:
    """Arguments of the case; small ones, as nothing is computed."""
    heads_q, heads_kv = case.heads
    capacity = 4096
    rows = capacity // case.page_size if case.page_size else 1
    shape = (rows, case.page_size or capacity, heads_kv)
    extras = dict(case.options)
    with_extras, with_mask = extras.pop("extras", False), extras.pop("key_mask", False)
    if with_extras:
        extras |= {"alibi_slopes": torch.ones(heads_q), "sinks": torch.ones(heads_q)}
    table = torch.zeros(1, rows, dtype=torch.int32) if case.page_size else None
    cache = KVCache(
        torch.empty(*shape, case.head_dim, dtype=case.dtype),
        torch.empty(*shape, case.head_dim_v, dtype=case.dtype),
        torch.zeros(1, dtype=torch.int32),
        table,
        cache_leftpad=torch.zeros(1, dtype=torch.int32) if with_extras else None,
        key_mask=torch.ones(1, capacity, dtype=torch.bool) if with_mask else None,
    )
    queries = Queries(torch.empty(1, case.q_len, heads_q, case.head_dim, dtype=case.dtype))
    return queries, cache, Options.make(head_dim=case.head_dim, **extras)


def linear_launches(case: Case, hardware: Hardware) -> None:
    """A layer of a model, with all that can go with it."""

    def weight(rows: int) -> torch.Tensor:
        return torch.empty(rows, 4096, dtype=case.dtype)

    norm = Norm(torch.empty(4096, dtype=case.dtype), 1e-5)
    qkv = Projection((weight(4096), weight(1024), weight(1024)), (weight(1)[0],) * 3, norm)
    gate_up = Projection((weight(14336), weight(14336)), norm=norm, gated="silu")
    x = torch.empty(16, 4096, dtype=case.dtype)
    for layer in (qkv, gate_up, Projection((weight(4096),))):
        tile = choose_linear_tile(layer.heights, hardware, gated=layer.gated is not None)
        out = torch.empty(16, layer.rows, dtype=case.dtype)
        residual = None if layer.norm else out
        linear.launch(x, layer, tile, residual=residual, out=out, overlaps=hardware.overlaps_launches)


def plan_of(case: Case, given: tuple[Queries, KVCache, Options], hardware: Hardware) -> Plan:
    """The plan of the case; the planner keeps shared work for large caches."""
    problem = execute.problem_of(*given, return_lse=True)
    if case.invariant:
        _, tile = invariant_tiles(problem, hardware)
        plan = make_plan(problem, hardware, batch_invariant=True)
        if plan.roles:  # leaves are merged in registers where runs were asked for
            tile = roles.runs_tile(problem) if case.runs else plan.tile
            runs, by_leaf = case.runs or plan.runs, plan.by_leaf and not case.runs
            return dataclasses.replace(plan, tile=tile, runs=runs, by_leaf=by_leaf)
        return dataclasses.replace(plan, tile=tile, runs=case.runs, by_leaf=False)
    plan = make_plan(problem, hardware, num_splits=case.num_splits)
    return dataclasses.replace(plan, num_splits=case.runs, balanced=True) if case.runs else plan


def launches(case: Case, hardware: Hardware) -> None:
    """Everything that the library launches for the case."""
    if case.linear:
        linear_launches(case, hardware)
        return
    given = tensors(case)
    queries, cache, _ = given
    older = dataclasses.replace(hardware, triton=(3, 4))  # which has no kernels of warps with roles
    for plan in dict.fromkeys(plan_of(case, given, which) for which in (hardware, older)):
        execute.run_kernels(*given, plan)
    if case.q_len == 1:
        new = torch.empty(1, 1, case.heads[1], case.head_dim, dtype=case.dtype)
        new_v = torch.empty(1, 1, case.heads[1], case.head_dim_v, dtype=case.dtype)
        angles = torch.empty(4096, case.head_dim // 4, dtype=case.dtype)
        rotary = Rotary(angles, angles, interleaved=case.page_size > 0)
        overlaps = hardware.overlaps_launches
        append.launch(
            NewTokens(new, new_v, rotary, queries.q, torch.empty_like(queries.q)), cache, overlaps=overlaps
        )
        append.launch(NewTokens(new, new_v), cache, overlaps=overlaps)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, stack and local memory of a compiled kernel, as the disassembler reports them."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        return {"registers": int(registers[1]) if registers else 0, "spills": int(spills[1]) if spills else 0}
    text = disassembler(kernel, "--dump-resource-usage")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def disassembler(kernel: Any, dump: str) -> str:
    """What the disassembler says of a kernel for an NVIDIA GPU."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), dump, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def products_in_turn(kernel: Any) -> float:
    """Share of a kernel's products that wait for the one right before them, being added to what it gives."""
    sums: list[str] = re.findall(r"\bHMMA\S* (R\d+)", disassembler(kernel, "--dump-sass"))
    return sum(a == b for a, b in itertools.pairwise(sums)) / max(1, len(sums))


def compile_all(names: list[str], cases: tuple[Case, ...] = CASES) -> Iterator[dict[str, Any]]:
    """Compile every case for every target, through the library's own launchers."""
    compiled: list[tuple[str, Any]] = []

    def capture(kernel: JITFunction[Any], grid: object) -> Callable[..., None]:
        def compile_only(*args: object, **kwargs: object) -> None:
            built = kernel.warmup(*args, grid=grid, **kwargs)
            compiled.append((kernel.fn.__name__, built))

        return compile_only

    JITFunction.__getitem__ = capture
    for index, name in enumerate(names):
        target, gpu = TARGETS[name]
        driver.set_active(OfflineDriver(index, target))
        hardware = Hardware.named(gpu)
        for case in cases:
            compiled.clear()
            launches(case, hardware)
            for kernel_name, kernel in compiled:
                record: dict[str, Any] = {"target": name, "case": case.name, "kernel": kernel_name}
                record |= {"smem": kernel.metadata.shared, "smem_limit": hardware.smem_bytes}
                is_read = name == ROLES_TARGET and kernel_name in ATTENTION
                record |= {"in_turn": products_in_turn(kernel)} if is_read else {}
                yield record | resources(kernel)


if __name__ == "__main__":
    for line in compile_all(sys.argv[1:] or list(TARGETS)):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
