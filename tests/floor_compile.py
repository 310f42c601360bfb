"""Compile the reading kernel for GPUs without one, and count what its loads became.

Run as ``python -m tests.floor_compile TARGET...``: one JSON line per shape, from instruction to count.
"""

from __future__ import annotations

import collections
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flash_decoding.bench.baselines import read_kernel

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ptx", r"(?:ld\.global|cp\.async\.c[ag])\S*"),
    "sm_90": (GPUTarget("cuda", 90, 32), "ptx", r"(?:ld\.global|cp\.async\.c[ag])\S*"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amdgcn", r"(?:global|buffer)_load_\w+"),
}

ALIGNED = [["tt.divisibility", 16]]
"""What a launch finds out about K, V and their words: multiples of 16."""


def loads(shape: read_kernel.Shape, target: str) -> dict[str, int]:
    """How often each load instruction stands in the kernel compiled for a target."""
    gpu, language, instruction = TARGETS[target]
    pointers = {name: "*i32" for name in ("k_ptr", "v_ptr", "sums_ptr")}
    constants = {"BLOCK": shape.block, "STAGES": shape.stages, "EVICT": shape.evict}
    source = ASTSource(
        fn=read_kernel.read_kernel,
        signature={**pointers, "words": "i32", **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(argument,): ALIGNED for argument in (0, 1, 3)},
    )
    built = triton.compile(source, target=gpu, options={"num_warps": shape.num_warps})
    return dict(collections.Counter(re.findall(instruction, built.asm[language])))


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        for candidate in read_kernel.SHAPES:
            print(json.dumps(loads(candidate, wanted)))
