"""From records to launches: plan the call, allocate its outputs and scratch, run the variant.

Imports the kernels only when a GPU call comes, so that a machine without Triton has the CPU path.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_decoding import cpu, repeats, sdpa
from flash_decoding.plan import Hardware, make_plan, plans_ahead
from flash_decoding.spec import KVCache, NewTokens, Options, Plan, Problem, Queries

if TYPE_CHECKING:
    from flash_decoding.kernels.repeat import Repeat


def problem_of(queries: Queries, cache: KVCache, options: Options, *, return_lse: bool) -> Problem:
    """The call in plain numbers, for the planner."""
    capacity = cache.capacity
    indirect = (cache.block_table, cache.cache_batch_idx, cache.cache_leftpad, cache.key_mask)
    return Problem(
        batch=queries.batch,
        q_len=queries.q_len,
        heads_q=queries.heads,
        heads_kv=cache.heads,
        head_dim=queries.q.shape[-1],
        head_dim_v=cache.v.shape[-1],
        kv_len=min(capacity, cache.max_kv_len) if cache.max_kv_len else capacity,
        element_bytes=queries.q.element_size(),
        page_size=cache.page_size,
        window_left=options.window_left,
        window_right=options.window_right,
        plain=options.is_plain,
        dense=cache.dense and not queries.is_ragged and all(x is None for x in indirect),
        return_lse=return_lse,
        ragged=queries.is_ragged,
        masked=cache.key_mask is not None,
        aligned=_is_aligned(cache.k) and _is_aligned(cache.v),
    )


def _is_aligned(x: Tensor) -> bool:
    """Whether the compiler knows that vectors begin at multiples of 16 bytes.

    It looks whether addresses, in bytes, and strides, in elements, are multiples of the same number.
    """
    return all(number % repeats.ALIGNMENT == 0 for number in (x.data_ptr(), *x.stride()[:-1]))


def attention(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = True,
    kind: repeats.Kind | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache by whatever the planner chooses.

    Args:
        queries: the query tokens.
        cache: the keys and values.
        options: scale, window, softcap, ALiBi, sinks.
        num_splits: programs that share the keys of one sequence and head; 0 leaves it to the planner.
        batch_invariant: fix the keys per split.
        return_lse: whether the LSE is wanted.
        kind: of the call, to keep its launches for those that follow.

    Returns:
        out: contiguous, like q with head_dim_v as last dimension.
        lse: (batch, heads_q, q_len), or (heads_q, total_q) when ragged, fp32; empty unless asked for.

    Raises:
        Unsupported: nothing here runs the call on this device; the message has every variant's reasons.
    """
    problem = problem_of(queries, cache, options, return_lse=return_lse)
    hardware = Hardware.of(queries.q.device)
    plan = make_plan(problem, hardware, num_splits=num_splits, batch_invariant=batch_invariant)
    if plan.variant == "cpu":
        out, lse = cpu.attend(
            queries, cache, options, num_splits=plan.num_splits, split_tokens=plan.split_tokens
        )
        return out, lse if return_lse else lse.new_empty(0)
    if plan.variant == "sdpa":
        return sdpa.attend(queries, cache, options), _new(queries, 0)
    return run_kernels(queries, cache, options, plan, return_lse=return_lse, kind=kind)


def run_kernels(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    return_lse: bool = True,
    kind: repeats.Kind | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton variant of :func:`attention`, for a plan in hand."""
    from flash_decoding.kernels import combine

    attend, balanced, _ = _kernels(roles=plan.roles)

    q = queries.q
    heads, head_dim_v, splits = queries.heads, cache.v.shape[-1], plan.num_splits
    tokens = q.numel() // (heads * q.shape[-1])
    out = q.new_empty((*q.shape[:-1], head_dim_v))
    lse, lse_strides = _new_lse(queries, return_lse)
    target = lse if return_lse else None
    if splits == 1 and not plan.balanced:
        strides = (*lse_strides, 0)
        first = attend.launch(queries, cache, options, plan, out=out, lse=target, lse_strides=strides)
        _keep(kind, first, out=out, lse=target)
        return out, lse
    if plan.split_tokens:
        _run_fixed(queries, cache, options, plan, out=out, lse=target, lse_strides=lse_strides, kind=kind)
        return out, lse
    if plan.balanced:
        rows = (splits + queries.batch - 1, queries.q_len, heads)
        part_strides = (0, 1, heads, queries.q_len * heads)
        parts, part_lse = _new(queries, *rows, head_dim_v), _new(queries, *rows)
        first = balanced.launch(
            queries, cache, options, plan, parts=parts, part_lse=part_lse, out=out, lse=target,
            lse_strides=lse_strides,
        )  # fmt: skip
    else:
        rows = (tokens, heads, splits)
        part_strides = (0 if queries.is_ragged else queries.q_len * heads * splits, splits, heads * splits, 1)
        parts, part_lse = _new(queries, *rows, head_dim_v), _new(queries, *rows)
        first = attend.launch(
            queries, cache, options, plan, out=parts, lse=part_lse, lse_strides=part_strides
        )
    last = combine.launch(
        queries, cache, options, plan, parts=parts, part_lse=part_lse, part_lse_strides=part_strides, out=out,
        lse=target, lse_strides=lse_strides,
    )  # fmt: skip
    _keep(kind, first, last, out=out, lse=target, scratch=(parts.numel(), part_lse.numel()))
    return out, lse


def _kernels(*, roles: bool) -> tuple[Any, Any, Any]:
    """The kernels of even splits, of equal runs, and of runs of whole splits of a fixed size: by warps with
    roles, or by warps that do everything.
    """
    if roles:
        from flash_decoding.kernels.roles import attend as even
        from flash_decoding.kernels.roles import balanced as runs

        return even, runs, runs
    from flash_decoding.kernels import attend, balanced, fixed

    return attend, balanced, fixed


def _run_fixed(
    queries: Queries,
    cache: KVCache,
    options: Options,
    plan: Plan,
    *,
    out: Tensor,
    lse: Tensor | None,
    lse_strides: tuple[int, int, int],
    kind: repeats.Kind | None,
) -> None:
    """Several parts of fixed sizes: states of splits or leaves, and their reduction."""
    from flash_decoding.kernels import fold

    rows = (out.numel() // (queries.heads * out.shape[-1]), queries.heads, plan.num_splits)
    parts, sums = _new(queries, *rows, out.shape[-1]), _new(queries, *rows, 2)
    attend, _, shared = _kernels(roles=plan.roles)
    if plan.runs:
        first = shared.launch(
            queries, cache, options, plan, parts=parts, part_lse=sums, out=out, lse=lse,
            lse_strides=lse_strides,
        )  # fmt: skip
    else:
        first = attend.launch(queries, cache, options, plan, out=parts, lse=sums, lse_strides=(0, 0, 0, 0))
    last = fold.launch(
        queries, cache, options, plan, parts=parts, part_lse=sums, out=out, lse=lse, lse_strides=lse_strides
    )
    _keep(kind, first, last, out=out, lse=lse, scratch=(parts.numel(), sums.numel()))


def warmup(queries: Queries, cache: KVCache, options: Options) -> None:
    """Compile what calls like this one can launch, by running each on the tensors given.

    A kernel is compiled per sizes of heads and pages and per option, not per length, batch or number of
    splits: small tensors stand for large ones. The planner adds choices: split or not, by sequence or
    by work, and which tile.
    """
    from flash_decoding.kernels.combine import SPLITS_AHEAD
    from flash_decoding.kernels.fold import PARTS_AHEAD

    problem = problem_of(queries, cache, options, return_lse=True)
    hardware = Hardware.of(queries.q.device)
    plans = plans_ahead(problem, hardware, splits=SPLITS_AHEAD, parts=PARTS_AHEAD)
    for plan, return_lse in itertools.product(plans, (False, True)):
        run_kernels(queries, cache, options, plan, return_lse=return_lse)


def append_kv(new: NewTokens, cache: KVCache, *, kind: repeats.Kind | None = None) -> None:
    """Write new keys and values into the cache in place; rotate them, and the queries, on the way.

    Args:
        new: the tokens.
        cache: where they go.
        kind: of the call, to keep its launch for those that follow.
    """
    if new.k.device.type == "cpu":
        cpu.append(new, cache)
        return
    from flash_decoding.kernels import append

    launched = append.launch(new, cache, overlaps=Hardware.of(new.k.device).overlaps_launches)
    if kind is not None and launched is not None:
        from flash_decoding.kernels.repeat import Chain

        repeats.keep(kind, repeats.AppendSteps(Chain((launched, repeats.append_sources(kind)))))


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial results along their first dimension.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v).
        lses: (splits, batch, heads_q, q_len) fp32, natural logarithm.
    """
    if outs.device.type == "cpu":
        return cpu.merge(outs, lses)
    from flash_decoding.kernels import merge as merging

    out, lse = outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])
    merging.launch(outs, lses, out=out, lse=lse)
    return out, lse


def _keep(
    kind: repeats.Kind | None,
    first: Repeat | None,
    last: Repeat | None = None,
    *,
    out: Tensor,
    lse: Tensor | None,
    scratch: tuple[int, int] = (0, 0),
) -> None:
    """Keep the launches of a call, where it has a kind and they can be repeated."""
    if kind is None or first is None:
        return
    from flash_decoding.kernels.repeat import Chain

    attending, combining = repeats.attention_sources(kind, combined=last is not None)
    links = [(first, attending)] + ([] if last is None else [(last, combining)])
    floats = torch.float32
    steps = repeats.AttentionSteps(
        Chain(*links),
        repeats.maker(out.device),
        repeats.filling_maker(out.device),
        repeats.Layout.of(out),
        None if lse is None else repeats.Layout.of(lse),
        None if last is None else repeats.Layout((sum(scratch),), (1,), floats),
        scratch[0] * floats.itemsize,
    )
    repeats.keep(kind, steps)


def _new(queries: Queries, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=queries.q.device)


def _new_lse(queries: Queries, wanted: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """A fresh lse and its strides over (sequence, head, token)."""
    if not wanted:
        return _new(queries, 0), (0, 0, 0)
    if queries.is_ragged:
        total = queries.q.shape[0]
        return _new(queries, queries.heads, total), (0, total, 1)
    lse = _new(queries, queries.batch, queries.heads, queries.q_len)
    return lse, (lse.stride(0), lse.stride(1), lse.stride(2))
