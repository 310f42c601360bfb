"""Attention over a cache on a CPU: heads packed, keys read in chunks, nothing expanded or copied whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_decoding.cpu.fused import TASKS_PER_THREAD, Fused, dtype_for, knows, knows_group
from flash_decoding.cpu.runs import Group, find_runs, make_groups
from flash_decoding.cpu.walk import Walk
from flash_decoding.spec import KVCache, Options, Queries

CHUNK_ELEMENTS = 2**20
"""Elements of keys (or values) that are copied at once: 4 MB in fp32. Less pays for more operators, more
falls out of the CPU's cache."""

PROMPT_TOKENS = 64
"""From this q_len on, arithmetic counts and not the number of operators: the walk takes PROMPT_CHUNK keys at
a time, about as many as a block has queries, so that many blocks are hidden as a whole by a causal mask."""

PROMPT_CHUNK = 256

SHORT = 1024
"""Keys of a sequence up to which its share of the work is too small to be divided among threads."""


def attend(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    num_splits: int = 0,
    split_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of every query token over the live slots of its sequence.

    Scores, softmax and sums are in fp32 (float64 for float64 inputs), whatever the dtype of the cache. In
    bfloat16 the exponentials are good to 2**-13, which is a sixteenth of what its outputs are good to.

    Args:
        queries: dense or ragged, in the dtype of the cache.
        cache: contiguous or paged.
        options: scale, mask and biases.
        num_splits: compute the keys of a sequence in at least this many parts. 0 lets the number of threads
            decide. Keys that have to be copied on their way are split further, to stay in the CPU's cache.
        split_tokens: most keys in a part, instead of ``num_splits``; the bits of a sequence's result then
            do not depend on what else is in the batch. 0: no such promise.

    Returns:
        out, like q with head_dim_v as last dimension and in its dtype, and the natural-log LSE in fp32,
        (batch, heads_q, q_len) or (heads_q, total_q) where ragged. Contiguous, both.

    Raises:
        InvalidInput: a page or a row of the cache that does not exist.
    """
    tokens = queries.q if queries.is_ragged else queries.q.flatten(0, 1)
    out = tokens.new_zeros(*tokens.shape[:2], cache.v.shape[-1])
    lse = out.new_full(out.shape[:2], -math.inf, dtype=torch.float32)
    most = max(1, CHUNK_ELEMENTS // (cache.heads * max(cache.k.shape[-1], cache.v.shape[-1])))
    walk, fused = Walk.of(cache, options), Fused.of(cache, options)
    for group in _groups(queries, cache, options, max_tokens=0 if split_tokens else most):
        index = torch.tensor([range(run.first_token, run.first_token + run.q_len) for run in group.runs])
        chunk, piece = max(1, most // len(group.runs)), split_tokens or _piece(group, num_splits)
        if knows(cache, options) and knows_group(options, group):
            rows, row_lses = fused.attend(tokens[index], group, chunk=chunk, piece=piece)
        else:
            limit = PROMPT_CHUNK if group.q_len >= PROMPT_TOKENS else chunk
            rows, row_lses = walk.attend(tokens[index], group, min(piece or chunk, chunk, limit))
        out[index], lse[index] = rows.to(out.dtype), row_lses.float()
    if queries.is_ragged:
        return out, lse.t().contiguous()
    shape = queries.q.shape[:-1]
    return out.view(*shape, -1), lse.view(shape).transpose(1, 2).contiguous()


def _groups(queries: Queries, cache: KVCache, options: Options, *, max_tokens: int) -> list[Group]:
    """What is computed together: up to ``max_tokens`` keys, or the batch if nothing has to be copied."""
    runs = find_runs(queries, cache, options)
    is_known = knows(cache, options)
    batch = Group(tuple(runs))
    if max_tokens and is_known and not queries.is_ragged and _is_one_view(queries, cache, options, batch):
        return [batch]
    return make_groups(runs, max_tokens=max_tokens, padded=not is_known)


def _is_one_view(queries: Queries, cache: KVCache, options: Options, batch: Group) -> bool:
    """Whether one fused call over a slice of the cache serves a dense batch, and all threads."""
    group = queries.heads // cache.heads
    is_view = cache.block_table is None and dtype_for(cache, queries.q_len * group) == cache.k.dtype
    is_busy = len(batch.runs) * cache.heads >= TASKS_PER_THREAD * torch.get_num_threads()
    return (
        is_view and batch.is_uniform and knows_group(options, batch) and (is_busy or batch.longest <= SHORT)
    )


def _piece(group: Group, num_splits: int) -> int:
    """Keys in each of so many parts; 0 if it does not matter."""
    return max(1, -(-group.longest // num_splits)) if num_splits else 0
