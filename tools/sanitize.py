"""Small launches of every kernel, to be run under compute-sanitizer: every allocation is its own.

``python -m tools.sanitize [SHARD SHARDS]``: all of them, or every SHARDS-th from SHARD on.

Lengths end inside tiles and pages, tables hold wild entries behind the lengths, and one call of each kind has
entries and lengths that are plainly wrong: whatever the numbers say, no access may leave a tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from flash_decoding import execute
from flash_decoding.kernels import append, linear, merge
from flash_decoding.plan import Hardware, make_plan
from flash_decoding.plan.linear import choose_linear_tile
from flash_decoding.projection import Norm, Projection
from flash_decoding.spec import KVCache, NewTokens, Plan, Rotary
from tests.helpers import Case, make_inputs
from tests.kernel_cases import EDGES

DEVICE = torch.device("cuda")

MANY_TILES = Case(name="many_tiles", capacity=700, seqlens=(700, 431), dtype=torch.bfloat16)
"""More than any ring has buffers."""


def run_case(case: Case) -> None:
    """One attention call in every way that the Triton variant has."""
    inputs = make_inputs(case, device=DEVICE)
    problem = execute.problem_of(*inputs, return_lse=True)
    hardware = Hardware.of(DEVICE)
    portable = dataclasses.replace(hardware, triton=(3, 4))  # which gives warps no roles
    for which in dict.fromkeys((hardware, portable)):
        whole, split = (make_plan(problem, which, num_splits=number) for number in (1, 3))
        fixed = fixed_sizes(make_plan(problem, which, batch_invariant=True))
        for plan in dict.fromkeys((whole, split, across_sequences(split), *fixed)):
            execute.run_kernels(*inputs, plan)


def across_sequences(plan: Plan) -> Plan:
    """The plan with its work shared across sequences, which the planner keeps for large caches."""
    return dataclasses.replace(plan, kind="flash_decoding", num_splits=5, split_tokens=0, balanced=True)


def fixed_sizes(plan: Plan) -> tuple[Plan, ...]:
    """A batch-invariant plan with splits of two tiles and leaves of one: a single split, a program for each
    split or each leaf, or some that share them across sequences. There is scratch for three parts of one.
    """
    keys = plan.tile.block_n
    plan = dataclasses.replace(plan, kind="flash_decoding", num_splits=3, by_leaf=False, runs=0)
    small = dataclasses.replace(plan, split_tokens=2 * keys, leaf_tokens=keys)
    shared, by_leaf = dataclasses.replace(small, runs=5), dataclasses.replace(small, by_leaf=True)
    alone = dataclasses.replace(small, num_splits=1)
    return alone, small, by_leaf, shared, *((dataclasses.replace(by_leaf, runs=5),) if plan.roles else ())


def run_wrong_numbers() -> None:
    """Lengths beyond the capacity, pages beyond the pool, an append over the end."""
    k, v = (torch.randn(6, 16, 2, 64, device=DEVICE, dtype=torch.float16) for _ in "kv")
    table = torch.tensor([[5, 99, -7], [2**30, 0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([1000, -3], dtype=torch.int32, device=DEVICE)
    wrong = KVCache(k, v, lengths, table)
    rows = KVCache(
        k[:2], v[:2], lengths, cache_batch_idx=torch.tensor([7, -7], dtype=torch.int32, device=DEVICE)
    )
    queries, _, options = make_inputs(Case(head_dim=64, dtype=torch.float16), device=DEVICE)
    for num_splits in (1, 3):
        problem = execute.problem_of(queries, rows, options, return_lse=True)
        execute.run_kernels(
            queries, rows, options, make_plan(problem, Hardware.of(DEVICE), num_splits=num_splits)
        )
        problem = execute.problem_of(queries, wrong, options, return_lse=True)
        plan = make_plan(problem, Hardware.of(DEVICE), num_splits=num_splits)
        execute.run_kernels(queries, wrong, options, plan)
        execute.run_kernels(queries, wrong, options, across_sequences(plan))
    for fixed in fixed_sizes(make_plan(problem, Hardware.of(DEVICE), batch_invariant=True)):
        execute.run_kernels(queries, wrong, options, fixed)
    new = torch.randn(2, 3, 2, 64, device=DEVICE, dtype=torch.float16)
    angles = torch.rand(20, 16, device=DEVICE, dtype=torch.float16)
    q_rotated = torch.empty_like(queries.q)
    append.launch(NewTokens(new, new, Rotary(angles, angles), queries.q, q_rotated), wrong, overlaps=True)


def run_linear_layers() -> None:
    """Rows and columns that fill no tile, with all that goes with them."""
    for rows, columns, gated in (((33, 7, 5), 100, False), ((40, 40), 72, True), ((130,), 264, False)):
        weights = tuple(torch.randn(r, columns, device=DEVICE, dtype=torch.float16) for r in rows)
        biases = tuple(weight[:, 0].contiguous() for weight in weights)
        norm = Norm(torch.rand(columns, device=DEVICE, dtype=torch.float16), 1e-5)
        layer = Projection(weights, biases, norm, "silu" if gated else None)
        tile = choose_linear_tile(layer.heights, Hardware.of(DEVICE), gated=gated)
        for tokens in (1, 5, 16):
            x = torch.randn(tokens, columns, device=DEVICE, dtype=torch.float16)
            out = torch.empty(tokens, layer.rows, device=DEVICE, dtype=torch.float16)
            residual = torch.randn_like(out)
            linear.launch(x, layer, tile, residual=residual, out=out, overlaps=True)


def run_merge() -> None:
    """Partial results that a caller holds."""
    outs, lses = torch.randn(40, 2, 1, 4, 80, device=DEVICE), torch.randn(40, 2, 4, 1, device=DEVICE)
    merge.launch(outs, lses, out=torch.empty_like(outs[0]), lse=torch.empty_like(lses[0]))


def run_control() -> None:
    """Two groups of warps that share nothing: what is reported here is of how Triton starts them."""
    if Hardware.of(DEVICE).gives_warps_roles:
        from tools.control import launch

        launch(DEVICE)


def jobs() -> Iterator[Callable[[], None]]:
    """All launches, in pieces that need nothing of each other."""
    yield from (run_control, run_wrong_numbers, run_linear_layers, run_merge)
    for case in (MANY_TILES, *EDGES):
        yield functools.partial(run_case, case)


def main(shard: int = 0, shards: int = 1) -> None:
    """Run them; the sanitizer counts the errors."""
    for job in itertools.islice(jobs(), shard, None, shards):
        job()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
