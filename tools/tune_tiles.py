"""Measure tiles for the planner's table on this machine's GPU: the records that its rows name.

    python -m tools.tune_tiles RECORD.json [KIND...]

For each kind of work it times every candidate tile with the planner's number of splits for it, over inputs
rotated past the L2 in CUDA graphs. Nothing is changed: the rows of ``plan.tiles`` are written by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash_decoding import execute
from flash_decoding.bench.capture import make_ready
from flash_decoding.bench.environment import describe
from flash_decoding.bench.timing import Burst, Call, Effort, measure
from flash_decoding.plan import Hardware
from flash_decoding.plan.splits import choose_num_splits, visible_tiles
from flash_decoding.plan.tiles import row_tiles, smem_bytes
from flash_decoding.spec import KVCache, Options, Plan, Problem, Queries, Tile

DEVICE = torch.device("cuda")

COMPILERS = 12
"""Processes that compile side by side before anything is timed."""


@dataclass(frozen=True)
class Work:
    """A kind of work: one shape that stands for it, and the rows that a tile for it may have."""

    batch: int
    kv_len: int
    q_len: int = 1
    heads_q: int = 16
    heads_kv: int = 2
    head_dim: int = 128
    page_size: int = 0
    dtype: torch.dtype = torch.float16
    block_m: tuple[int, ...] = (16,)


KINDS = {
    "many_short": Work(256, 256),
    "one_wave": Work(64, 1024),
    "some_splits": Work(8, 8192),
    "one_long": Work(1, 65536),
    "gqa_1g": Work(64, 4096, heads_q=32, heads_kv=8),
    "head_dim_64": Work(8, 4096, heads_q=64, heads_kv=8, head_dim=64),
    "head_dim_256": Work(8, 4096, heads_q=16, heads_kv=4, head_dim=256),
    "group_32": Work(8, 8192, heads_q=32, heads_kv=1, block_m=(32,)),
    "pages_of_16": Work(32, 4096, heads_q=32, heads_kv=8, page_size=16),
    "pages_of_64": Work(32, 4096, heads_q=32, heads_kv=8, page_size=64),
    "verify_4": Work(4, 20000, q_len=4, heads_q=64, heads_kv=8, block_m=(32,)),
    "verify_8": Work(4, 20000, q_len=8, heads_q=64, heads_kv=8, block_m=(64,)),
    "prefill": Work(1, 8192, q_len=2048, heads_q=32, heads_kv=8, block_m=(64, 128)),
    "prefill_64": Work(1, 8192, q_len=2048, heads_q=32, heads_kv=8, head_dim=64, block_m=(64, 128)),
    "prefill_256": Work(1, 8192, q_len=1024, heads_q=16, heads_kv=4, head_dim=256, block_m=(64, 128)),
    "fp32": Work(8, 4096, dtype=torch.float32),
}


def candidates(work: Work, problem: Problem, hardware: Hardware) -> Iterable[Tile]:
    """Tiles that fit the shared memory."""
    shapes = itertools.product(work.block_m, (16, 32, 64, 128), (4, 8), (2, 3, 4))
    for block_m, block_n, num_warps, num_stages in shapes:
        tile = Tile(block_m, block_n, num_warps, num_stages)
        is_small = block_n == 16 and work.dtype != torch.float32
        if not is_small and smem_bytes(problem, tile) <= hardware.smem_bytes:
            yield tile


def calls(work: Work, hardware: Hardware, count: int) -> dict[str, tuple[Plan, list[Call]]]:
    """Every candidate's calls, one per input set."""
    sets = [inputs(work, seed) for seed in range(count)]
    problem = execute.problem_of(*sets[0], return_lse=False)
    made = {}
    for tile in candidates(work, problem, hardware):
        programs = row_tiles(problem, tile.block_m) * problem.heads_kv * problem.batch
        tiles = visible_tiles(problem, tile)
        splits = choose_num_splits(programs=programs, tiles=tiles, slots=hardware.sm_count)
        plan = Plan(
            "flash_decoding" if splits > 1 else "flash_attention",
            "triton",
            tile,
            splits,
            0,
            (),
            hardware.overlaps_launches,
        )
        made[str(dataclasses.astuple(tile))] = (plan, [_call(given, plan) for given in sets])
    return made


def _call(given: tuple[Queries, KVCache, Options], plan: Plan) -> Call:
    return lambda: execute.run_kernels(*given, plan, return_lse=False)[0]


def _sets(work: Work, hardware: Hardware) -> int:
    kv_bytes = 2 * work.batch * work.kv_len * work.heads_kv * work.head_dim * work.dtype.itemsize
    return max(2, -(-4 * hardware.l2_bytes // kv_bytes))


def inputs(work: Work, seed: int) -> tuple[Queries, KVCache, Options]:
    """One set: every sequence fills its cache; pages are shuffled."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, work.head_dim, generator=generator, dtype=work.dtype, device=DEVICE)

    pages = work.batch * work.kv_len // work.page_size if work.page_size else 0
    shape = (pages, work.page_size, work.heads_kv) if pages else (work.batch, work.kv_len, work.heads_kv)
    table = None
    if pages:
        order = torch.randperm(pages, generator=generator, device=DEVICE)
        table = order.int().reshape(work.batch, -1)
    lengths = torch.full((work.batch,), work.kv_len, dtype=torch.int32, device=DEVICE)
    cache = KVCache(randn(*shape), randn(*shape), lengths, table)
    queries = Queries(randn(work.batch, work.q_len, work.heads_q))
    return queries, cache, Options.make(head_dim=work.head_dim, causal=True)


def tune(name: str, hardware: Hardware) -> dict[str, Any]:
    """Times of all candidates for one kind of work, the fastest first."""
    made = calls(KINDS[name], hardware, _sets(KINDS[name], hardware))
    bursts: dict[str, Burst] = {label: make_ready(runs, DEVICE).burst for label, (_, runs) in made.items()}
    timings = measure(bursts, Effort(budget_s=0.02, min_samples=7, max_samples=30))
    ranked = sorted(timings, key=lambda label: timings[label].median_s)
    tiles = [
        {"tile": label, "splits": made[label][0].num_splits, "median_us": timings[label].median_s * 1e6}
        for label in ranked
    ]
    work = {key: str(value) for key, value in dataclasses.asdict(KINDS[name]).items()}
    return {"kind": name, "work": work, "tiles": tiles}


def compile_all(name: str) -> None:
    """Run every candidate once, which leaves its kernels in Triton's cache."""
    for _, (call,) in calls(KINDS[name], Hardware.of(DEVICE), 1).values():
        call()
    torch.cuda.synchronize()


def main(record: str, *kinds: str) -> None:
    """Tune and write the record after every kind, so that an interrupted run keeps what it has."""
    with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_all, kinds or KINDS))
    hardware = Hardware.of(DEVICE)
    content: dict[str, Any] = {"environment": describe(DEVICE), "kinds": []}
    for name in kinds or KINDS:
        content["kinds"].append(tune(name, hardware))
        best = ", ".join(f"{t['tile']} {t['median_us']:.1f}" for t in content["kinds"][-1]["tiles"][:4])
        sys.stdout.write(f"{name:<14} {best}\n")
        sys.stdout.flush()
        Path(record).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
