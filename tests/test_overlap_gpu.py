"""Lengths that change while an attention kernel is already in place: what it expected by then is wrong.

Nothing in the library changes a length so late, but callers' kernels may. The one here lets the next kernel
start, does nothing for long, and only then writes: the attention kernel behind it has read the old lengths by
that time, found its work, and asked for its first keys.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

import triton
import triton.language as tl

from flash_decoding import execute
from flash_decoding.kernels import overlap
from flash_decoding.plan import Hardware
from flash_decoding.spec import Plan
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.kernel_cases import plan_of as portable_plan_of
from tests.test_roles_gpu import need_roles
from tests.test_roles_gpu import plan_of as plan_with_roles_of

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")

WAIT_NS = 2_000_000
"""Longer than a launch takes the host."""

CAPACITY = 1000


@triton.jit  # type: ignore[untyped-decorator]  # triton.jit
def nanoseconds() -> tl.tensor:
    """The device's clock."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer; // $1",
        "=l,r",
        [tl.program_id(0)],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit  # type: ignore[untyped-decorator]  # triton.jit
def change_late_kernel(
    lengths_ptr: tl.tensor,
    new_ptr: tl.tensor,
    batch: tl.tensor,
    WAIT: tl.constexpr,  # noqa: N803 - a compile-time constant
    LANES: tl.constexpr,  # noqa: N803 - likewise
) -> None:
    overlap.wait_for_the_kernel_before()
    overlap.let_the_next_kernel_start()
    start = nanoseconds()
    now = start
    while now - start < WAIT:
        now = nanoseconds()
    lanes = tl.arange(0, LANES)
    tl.store(lengths_ptr + lanes, tl.load(new_ptr + lanes, mask=lanes < batch), mask=lanes < batch)


def change_late(lengths: torch.Tensor, new: torch.Tensor) -> None:
    """Launch the kernel that comes before."""
    change_late_kernel[(1,)](lengths, new, len(new), WAIT_NS, 16, **overlap.launch_options(enabled=True))


def plans(case: Case, *, roles: bool) -> dict[str, Plan]:
    """Whole sequences, even splits, equal runs, fixed splits with a program each, in runs, and by leaf."""
    if roles:
        sizes = {"num_splits": 8, "split_tokens": 256, "leaf_tokens": 128}
        changes: dict[str, dict[str, int | bool]] = {
            "whole": {"num_splits": 1},
            "splits": {"num_splits": 3},
            "one after another": {"num_splits": 3, "programs": 2},
            "runs": {"num_splits": 5, "balanced": True},
            "fixed": sizes,
            "runs of fixed": sizes | {"runs": 3},
            "by leaf": sizes | {"num_splits": 16, "by_leaf": True},
        }
        return {name: plan_with_roles_of(case, **change) for name, change in changes.items()}
    inputs = make_inputs(case, device=DEVICE)
    fixed = portable_plan_of(inputs, batch_invariant=True)
    return {
        "whole": portable_plan_of(inputs, num_splits=1),
        "splits": portable_plan_of(inputs, num_splits=3),
        "runs": portable_plan_of(inputs, runs=5),
        "fixed": fixed,
        "runs of fixed": dataclasses.replace(fixed, num_splits=16, runs=3, by_leaf=False),
    }


NAMES = ("whole", "splits", "one after another", "runs", "fixed", "runs of fixed", "by leaf")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles", [False, True], ids=["portable", "roles"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((900, 1, 300, 0), (901, 2, 301, 1)),
        ((900, 1, 300, 0), (3, 1000, 0, 640)),
        ((0, 0, 0, 0), (1000, 1, 257, 64)),
        ((1000, 1, 257, 64), (0, 0, 0, 0)),
    ],
    ids=["one more", "others", "from nothing", "to nothing"],
)
def test_lengths_may_change_until_the_kernel_before_is_complete(
    before: tuple[int, ...], after: tuple[int, ...], roles: bool, name: str
) -> None:
    if not Hardware.of(DEVICE).overlaps_launches:
        pytest.skip("kernels overlap from Hopper on")
    if roles:
        need_roles()
    case = Case(batch=4, capacity=CAPACITY, seqlens=after, heads_q=8, heads_kv=2, dtype=torch.bfloat16)
    plan = plans(case, roles=roles).get(name)
    if plan is None:
        pytest.skip("the portable kernels know no such plan")
    inputs = make_inputs(case, device=DEVICE)
    lengths = inputs.cache.cache_seqlens
    new, old = lengths.clone(), torch.tensor(before, dtype=lengths.dtype, device=DEVICE)
    execute.run_kernels(*inputs, plan)  # compiled by now, so the next launches follow each other at once
    change_late(lengths, new)
    lengths.copy_(old)
    torch.cuda.synchronize()
    change_late(lengths, new)
    out, lse = execute.run_kernels(*inputs, plan)
    assert torch.equal(lengths, new)
    assert_close_to_reference(out, lse, *inputs)
