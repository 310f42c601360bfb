"""Small launches of every kernel, to be run under compute-sanitizer: every allocation is its own.

Lengths end inside tiles and pages, tables hold wild entries behind the lengths, and one call of each kind has
entries and lengths that are plainly wrong: whatever the numbers say, no access may leave a tensor.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from flash_decoding import execute
from flash_decoding.kernels import append, combine
from flash_decoding.plan import Hardware, make_plan
from flash_decoding.spec import KVCache, NewTokens, Rotary
from tests.helpers import Case, make_inputs
from tests.kernel_cases import EDGES

DEVICE = torch.device("cuda")


def run_case(case: Case, num_splits: int) -> None:
    """One attention call through the Triton variant."""
    inputs = make_inputs(case, device=DEVICE)
    problem = execute.problem_of(*inputs, return_lse=True)
    execute.run_kernels(*inputs, make_plan(problem, Hardware.of(DEVICE), num_splits=num_splits))


def run_wrong_numbers() -> None:
    """Lengths beyond the capacity, pages beyond the pool, an append over the end."""
    k, v = (torch.randn(6, 16, 2, 64, device=DEVICE, dtype=torch.float16) for _ in "kv")
    table = torch.tensor([[5, 99, -7], [2**30, 0, 1]], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([1000, -3], dtype=torch.int32, device=DEVICE)
    wrong = KVCache(k, v, lengths, table)
    queries, _, options = make_inputs(Case(head_dim=64, dtype=torch.float16), device=DEVICE)
    for num_splits in (1, 3):
        problem = execute.problem_of(queries, wrong, options, return_lse=True)
        plan = make_plan(problem, Hardware.of(DEVICE), num_splits=num_splits)
        execute.run_kernels(queries, wrong, options, plan)
    new = torch.randn(2, 3, 2, 64, device=DEVICE, dtype=torch.float16)
    angles = torch.rand(20, 16, device=DEVICE, dtype=torch.float16)
    q_rotated = torch.empty_like(queries.q)
    append.launch(NewTokens(new, new, Rotary(angles, angles), queries.q, q_rotated), wrong, overlaps=True)


def main() -> None:
    """Run them all; the sanitizer counts the errors."""
    for case in EDGES:
        for num_splits in (1, 3):
            run_case(case, num_splits)
    run_wrong_numbers()
    outs, lses = torch.randn(40, 2, 1, 4, 80, device=DEVICE), torch.randn(40, 2, 4, 1, device=DEVICE)
    combine.merge(outs, lses, out=torch.empty_like(outs[0]), lse=torch.empty_like(lses[0]))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
