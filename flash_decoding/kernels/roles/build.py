"""What kernels of warps with roles are compiled for: as the portable ones, and rings and registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flash_decoding.kernels import arguments, fixed_sizes

if TYPE_CHECKING:
    from flash_decoding.spec import KVCache, Options, Plan, Queries

LOADERS = 4
"""Warps that load."""


REGISTERS, REGISTERS_OF_LOADERS = 144, 120
"""Of a thread, and of one that loads: what those leave, the multipliers have. Just too many for a second
program on the multiprocessor: the next call's come early, and would settle two by two. What is left of
registers has room for the combine, before this program has ended."""

MORE_REGISTERS, MORE_REGISTERS_OF_LOADERS = 168, 104
"""The same for wide heads and for options on scores, which would spill."""


def constants(queries: Queries, cache: KVCache, options: Options, plan: Plan) -> dict[str, Any]:
    """Compile-time arguments of a call's kernel."""
    same = arguments.constants(queries, cache, options, plan)
    roomy = options.is_plain and max(same["BLOCK_D"], same["BLOCK_DV"]) <= 128
    return {
        **same,
        "LEAVES": fixed_sizes.merges_leaves(plan),
        "num_stages": 1,
        "maxnreg": REGISTERS if roomy else MORE_REGISTERS,
        "STAGES": plan.tile.num_stages,
        "IN_FLIGHT": plan.tile.in_flight or plan.tile.num_stages,
        "LOADERS": LOADERS,
        "LOADER_REGISTERS": REGISTERS_OF_LOADERS if roomy else MORE_REGISTERS_OF_LOADERS,
    }
