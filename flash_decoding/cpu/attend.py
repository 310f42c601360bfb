"""Attention over a cache on a CPU: heads packed, keys walked in chunks, nothing expanded or copied whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_decoding.cpu import prompt
from flash_decoding.cpu.runs import Group, find_runs, make_groups
from flash_decoding.cpu.walk import Walk
from flash_decoding.spec import KVCache, Options, Queries

CHUNK_ELEMENTS = 2**20
"""Elements of keys (or values) in one step: 4 MB in fp32. Less pays for more operators, more falls out of the
CPU's cache."""

PROMPT_CHUNK = 256
"""Most keys in a chunk of a prompt: about as long as a block of its queries, so that a causal mask hides many
blocks as a whole."""


def attend(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    num_splits: int = 0,
    split_tokens: int = 0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of every query token over the live slots of its sequence.

    Sequences of similar lengths share each step. Scores, softmax and sums are in fp32 (float64 for float64
    inputs), whatever the dtype of the cache.

    Args:
        queries: dense or ragged, in the dtype of the cache.
        cache: contiguous or paged.
        options: scale, mask and biases.
        num_splits: walk the keys in at least this many chunks; 0 and 1 leave it to the size of the CPU's
            cache, which bounds a chunk in any case.
        split_tokens: most keys in a chunk, instead of ``num_splits``; the bits of a sequence's result then
            do not depend on what else is in the batch. 0: no such promise.
        return_lse: without, long prompts may run faster.

    Returns:
        out, like q with head_dim_v as last dimension and in its dtype, and the natural-log LSE in fp32,
        (batch, heads_q, q_len) or (heads_q, total_q) where ragged; empty unless asked for. Contiguous, both.

    Raises:
        InvalidInput: a page or a row of the cache that does not exist.
    """
    runs = find_runs(queries, cache, options)
    batch = Group(tuple(runs))
    if not (return_lse or split_tokens or num_splits > 1) and prompt.serves(queries, cache, options, batch):
        return prompt.attend(queries, cache, options, batch), torch.empty(0)
    tokens = queries.q if queries.is_ragged else queries.q.flatten(0, 1)
    out = tokens.new_zeros(*tokens.shape[:2], cache.v.shape[-1])
    lse = out.new_full(out.shape[:2], -math.inf, dtype=torch.float32)
    most = max(1, CHUNK_ELEMENTS // (cache.heads * max(cache.k.shape[-1], cache.v.shape[-1])))
    walk = Walk.of(cache, options)
    for group in make_groups(runs, max_tokens=0 if split_tokens else most):
        chunk = min(split_tokens, most) or _chunk(group, most // len(group.runs), num_splits)
        index = torch.tensor([range(run.first_token, run.first_token + run.q_len) for run in group.runs])
        out_rows, lse_rows = walk.attend(tokens[index], group, chunk)
        out[index], lse[index] = out_rows.to(out.dtype), lse_rows.to(lse.dtype)
    return out.view(*queries.q.shape[:-1], -1), _arrange(lse, queries) if return_lse else torch.empty(0)


def _arrange(lse: Tensor, queries: Queries) -> Tensor:
    """From (total_q, heads_q) to what callers see."""
    if queries.is_ragged:
        return lse.t().contiguous()
    return lse.view(queries.q.shape[:-1]).transpose(1, 2).contiguous()


def _chunk(group: Group, most: int, num_splits: int) -> int:
    """Keys per step."""
    even = -(-group.longest // max(num_splits, 1))
    limit = most if group.q_len < prompt.PROMPT_TOKENS else min(most, PROMPT_CHUNK)
    return max(1, min(even, limit))
