"""What attention kernels are given, and what they are compiled for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton

from flash_decoding.kernels import fixed_sizes, keys, overlap, score
from flash_decoding.kernels.part import FEW_ROWS, are_finished
from flash_decoding.spec import padded

if TYPE_CHECKING:
    from torch import Tensor

    from flash_decoding.spec import KVCache, Options, Plan, Queries


def inputs(
    queries: Queries, cache: KVCache, options: Options, out: Tensor, lse: Tensor | None
) -> tuple[object, ...]:
    """What every attention kernel takes first, in its order.

    Strides of values are None where values lie as keys do: then one address is enough for both. (In fp32, and
    of wide heads, what has to be kept until then is more than it saves.)
    """
    k_strides, v_strides = cache.k.stride()[:3], cache.v.stride()[:3]
    is_narrow = cache.k.element_size() == 2 and max(cache.k.shape[-1], cache.v.shape[-1]) <= 128
    q, table, alibi, mask = queries.q, cache.block_table, options.alibi_slopes, cache.key_mask
    return (
        q,
        cache.k,
        cache.v,
        out,
        lse,
        (0, *q.stride()[:2]) if queries.is_ragged else q.stride()[:3],
        k_strides,
        None if is_narrow and v_strides == k_strides else v_strides,
        cache.cache_seqlens,
        cache.cache_leftpad,
        mask,
        None if mask is None else mask.stride(0),
        None if mask is None else mask.shape[1],
        cache.cache_batch_idx,
        table,
        queries.cu_seqlens_q,
        alibi,
        score.alibi_strides(alibi),
        options.sinks,
        options.softmax_scale,
        options.softcap,
        options.window_left,
        options.window_right,
        queries.q_len,
        cache.new_tokens,
        cache.capacity,
        cache.k.shape[0],
        cache.k.shape[0] if table is None else table.shape[0],
        0 if table is None else table.stride(0),
    )


def constants(queries: Queries, cache: KVCache, options: Options, plan: Plan) -> dict[str, Any]:
    """What a compiled attention kernel is made for (contract C6), and how it is built."""
    head_dim, head_dim_v = queries.q.shape[-1], cache.v.shape[-1]
    return {
        "HEADS_KV": cache.heads,
        "GROUP": queries.heads // cache.heads,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim_v),
        "BLOCK_M": plan.tile.block_m,
        "BLOCK_N": plan.tile.block_n,
        "PAGE_SIZE": cache.page_size,
        "SCORES": score.way_of(options),
        "OVERLAP": plan.overlap,
        "num_warps": plan.tile.num_warps,
        "num_stages": pipeline_stages(plan, cache),
        **keys.bounds(options, queries.q_len),
        **overlap.launch_options(plan.overlap),
    }


def of_parts(plan: Plan) -> dict[str, int | bool]:
    """What a kernel of splits with a program each is compiled for, beside :func:`constants`.

    Parts of a fixed size go to scratch as states, for a reduction that has an order of its own.
    """
    is_split = plan.num_splits > 1
    states = plan.split_tokens > 0 and is_split
    kinds = {"IS_SPLIT": is_split, "STATES": states, "LEAVES": fixed_sizes.merges_leaves(plan)}
    return kinds | fixed_sizes.constants(plan)


REDUCING_WARPS = 1
"""Of a program that reduces. A warp does it without a barrier and starts the soonest: the best of 1 and 4 at
every size measured."""

REDUCING_REGISTERS = 128
"""Of its threads, at most. Told so, the assembler asks for all parts before it needs the first; left to
itself it makes do with fewer, and waits for some parts before it asks for others."""


def of_reduction(
    queries: Queries, cache: KVCache, options: Options, plan: Plan, head_dim_v: int
) -> dict[str, Any]:
    """What reductions are compiled for, and how they are built.

    Many rows have more programs than there are places for: then fewer registers are better.
    """
    few = {"maxnreg": REDUCING_REGISTERS} if plan.overlap and plan.tile.block_m == FEW_ROWS.value else {}
    return {
        "GROUP": queries.heads // cache.heads,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_M": plan.tile.block_m,
        "BLOCK_N": plan.tile.block_n,
        "FINISHED": are_finished(plan),
        "OVERLAP": plan.overlap,
        "num_warps": REDUCING_WARPS,
        **few,
        **overlap.launch_options(plan.overlap),
        **keys.bounds(options, queries.q_len),
    }


STAGES_SCALAR_LOADS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
"""Whether Triton gives stages to loads of single table entries, as it does to loads of several."""


def pipeline_stages(plan: Plan, cache: KVCache) -> int:
    """Stages to ask Triton for, so that keys and values are ``tile.num_stages`` deep.

    A paged load waits for its table entry, which is a pipeline before the pipeline: Triton shares the stages
    between the two.
    """
    stages, page_size = plan.tile.num_stages, cache.page_size
    is_scalar = page_size % plan.tile.block_n == 0
    if page_size == 0 or (is_scalar and not STAGES_SCALAR_LOADS):
        return stages
    return 2 * stages - 1
