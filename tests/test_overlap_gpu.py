"""A call that is placed early believes nothing that the kernel before it may still change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from flash_decoding import execute
from flash_decoding.kernels import overlap
from flash_decoding.plan import Hardware, make_plan
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.kernel_cases import plan_of

pytestmark = pytest.mark.gpu

DELAY_NS = tl.constexpr(1_000_000)


@triton.jit  # type: ignore[untyped-decorator]  # triton.jit
def change_lengths_late_kernel(
    lengths_ptr: tl.tensor,
    late_ptr: tl.tensor,
    batch: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - a compile-time constant
) -> None:
    """Let the next kernel start; sleep; then change what it reads."""
    overlap.let_the_next_kernel_start()
    tl.inline_asm_elementwise(
        "nanosleep.u32 $1; // $0", "=r,r", [DELAY_NS], dtype=tl.int32, is_pure=False, pack=1
    )
    lanes = tl.arange(0, BLOCK)
    late = tl.load(late_ptr + lanes, mask=lanes < batch, other=0)
    tl.store(lengths_ptr + lanes, late, mask=lanes < batch)


@pytest.mark.parametrize("kernel", ["runs", "splits", "runs with roles", "splits with roles"])
def test_lengths_that_change_at_the_last_moment(kernel: str) -> None:
    device = torch.device("cuda")
    if not Hardware.of(device).overlaps_launches:
        pytest.skip("kernels do not overlap on this GPU")
    case = Case(batch=3, capacity=700, seqlens=(700, 33, 129), dtype=torch.float16, heads_q=8, heads_kv=2)
    inputs = make_inputs(case, device=device)
    plan = plan_of(inputs, runs=7) if kernel.startswith("runs") else plan_of(inputs, num_splits=5)
    tile = dataclasses.replace(plan.tile, block_m=16, block_n=32, num_stages=2)
    plan = dataclasses.replace(plan, tile=tile, roles=kernel.endswith("roles"))
    lengths = inputs.cache.cache_seqlens
    late = lengths.clone()
    execute.run_kernels(*inputs, plan)  # compiled
    for early in ((1, 1, 1), (700, 700, 700), (33, 129, 700)):
        lengths.copy_(torch.tensor(early, dtype=torch.int32))
        torch.cuda.synchronize()
        change_lengths_late_kernel[(1,)](lengths, late, case.batch, 4)
        out, lse = execute.run_kernels(*inputs, plan)
        assert_close_to_reference(out, lse, *inputs)


def test_hopper_plans_warps_with_roles_where_they_ran() -> None:
    """By the Triton at hand: others take the portable kernel."""
    hardware = Hardware.of(torch.device("cuda"))
    inputs = make_inputs(Case(batch=1, capacity=4096, dtype=torch.bfloat16), device=torch.device("cuda"))
    problem = execute.problem_of(*inputs, return_lse=True)
    assert make_plan(problem, hardware).roles == hardware.gives_warps_roles
