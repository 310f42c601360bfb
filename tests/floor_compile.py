"""Compile the reading kernels for GPUs without one, and count what its loads became.

Run as ``python -m tests.floor_compile TARGET...``: for each kernel and shape a line of JSON, counts.
"""

from __future__ import annotations

import collections
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_decoding.bench.baselines import read_kernel, read_kernel_runs

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ptx", r"(?:ld\.global|cp\.async\.c[ag])\S*"),
    "sm_90": (GPUTarget("cuda", 90, 32), "ptx", r"(?:ld\.global|cp\.async\.c[ag])\S*"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amdgcn", r"(?:global|buffer)_load_\w+"),
}

ALIGNED = [["tt.divisibility", 16]]
"""What a launch finds out about pointers and numbers of words: multiples of 16."""

KERNELS = (
    (
        read_kernel.read_kernel,
        {"k_ptr": "*i32", "v_ptr": "*i32", "sums_ptr": "*i32", "words": "i32"},
        (0, 1, 3),
    ),
    (
        read_kernel_runs.read_runs_kernel,
        {
            "k_ptr": "*i32",
            "v_ptr": "*i32",
            "starts_ptr": "*i64",
            "counts_ptr": "*i32",
            "sums_ptr": "*i32",
            "blocks": "i32",
        },
        (0, 1, 2, 3),
    ),
)
"""Each kernel, the types of its arguments, and which of them are aligned."""


def loads(number: int, shape: read_kernel.Shape, target: str) -> dict[str, int]:
    """How often each load instruction of keys and values stands in a kernel compiled for a target."""
    kernel, signature, aligned = KERNELS[number]
    gpu, language, instruction = TARGETS[target]
    constants = {"BLOCK": shape.block, "STAGES": shape.stages, "EVICT": shape.evict}
    source = ASTSource(
        fn=kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(argument,): ALIGNED for argument in aligned},
    )
    built = triton.compile(source, target=gpu, options={"num_warps": shape.num_warps})
    return dict(collections.Counter(re.findall(instruction, built.asm[language])))


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        for kernel_number in range(len(KERNELS)):
            for candidate in read_kernel.SHAPES:
                print(json.dumps(loads(kernel_number, candidate, wanted)))
