"""Attention over a cache on a CPU: heads packed, keys walked in chunks, nothing expanded or copied whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.cpu.mask import Mask
from flash_decoding.cpu.runs import Group, find_runs, make_groups
from flash_decoding.cpu.softmax import Softmax
from flash_decoding.cpu.stage import Stage
from flash_decoding.spec import KVCache, Options, Queries

CHUNK_ELEMENTS = 2**20
"""Elements of keys (or values) in one step: 4 MB in fp32. Less pays for more operators, more falls out of the
CPU's cache."""

SCORE_ELEMENTS = 2**19
"""Scores in one step: 2 MB in fp32, for the same reasons. It bounds the memory of a long prompt."""

PROMPT_TOKENS = 64
"""From this q_len on, arithmetic counts and not the number of operators: chunks are PROMPT_CHUNK keys at
most, about as long as a block of queries, so that many blocks are hidden as a whole by a causal mask."""

PROMPT_CHUNK = 256


def attend(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    num_splits: int = 0,
    split_tokens: int = 0,
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

    Returns:
        out, like q with head_dim_v as last dimension and in its dtype, and the natural-log LSE in fp32,
        (batch, heads_q, q_len) or (heads_q, total_q) where ragged.

    Raises:
        InvalidInput: a page or a row of the cache that does not exist.
    """
    tokens = queries.q if queries.is_ragged else queries.q.flatten(0, 1)
    out = tokens.new_zeros(*tokens.shape[:2], cache.v.shape[-1])
    lse = out.new_full(out.shape[:2], -math.inf, dtype=torch.float32)
    max_tokens = max(1, CHUNK_ELEMENTS // (cache.heads * max(cache.k.shape[-1], cache.v.shape[-1])))
    table = cache.block_table
    walk = _Walk(cache, options, Stage(cache.k, table), Stage(cache.v, table))
    runs = find_runs(queries, cache, options)
    for group in make_groups(runs, max_tokens=0 if split_tokens else max_tokens):
        chunk = split_tokens or _chunk(group, max_tokens // len(group.runs), num_splits)
        index = torch.tensor([[run.first_token + i for i in range(run.q_len)] for run in group.runs])
        out_rows, lse_rows = walk.attend(tokens[index], group, min(chunk, max_tokens))
        out[index], lse[index] = out_rows.to(out.dtype), lse_rows.to(lse.dtype)
    if queries.is_ragged:
        return out, lse.t().contiguous()
    shape = queries.q.shape[:3]
    return out.view(*shape, -1), lse.view(shape).transpose(1, 2).contiguous()


def _chunk(group: Group, most: int, num_splits: int) -> int:
    """Keys per step."""
    even = -(-group.longest // max(num_splits, 1))
    limit = most if group.q_len < PROMPT_TOKENS else min(most, PROMPT_CHUNK)
    return max(1, min(even, limit))


@dataclass(frozen=True)
class _Walk:
    """What all groups of a call have in common."""

    cache: KVCache
    options: Options
    stage_k: Stage
    stage_v: Stage

    def attend(self, q: Tensor, group: Group, chunk: int) -> tuple[Tensor, Tensor]:
        """Attention of q (runs, q_len, heads_q, head_dim).

        Returns out (runs, q_len, heads_q, head_dim_v) and LSE (runs, q_len, heads_q).
        """
        runs, q_len, heads_q, head_dim = q.shape
        heads = (self.cache.heads, heads_q // self.cache.heads)
        q = q.to(self.stage_k.dtype) * self.options.softmax_scale
        q = _pack(q.view(runs, q_len, *heads, head_dim))
        state = Softmax.empty(q, self.cache.v.shape[-1])
        if self.options.sinks is not None:
            sinks = self.options.sinks.to(q.dtype).view(*heads, 1)
            state.add_sink(_pack(sinks.expand(runs, q_len, *heads, 1)))
        mask = Mask(self.options, group, heads)
        for start in range(0, group.longest, chunk):
            self._take_in(state, q, mask, (start, min(start + chunk, group.longest)))
        out, lse = (_unpack(rows, runs, heads) for rows in state.finish())
        return out, lse[..., 0]

    def _take_in(self, state: Softmax, q: Tensor, mask: Mask, keys: tuple[int, int]) -> None:
        """One chunk of keys, for all rows that see any of it."""
        q_len, (heads, group) = mask.group.q_len, mask.heads
        runs = len(mask.group.runs)
        step = max(1, SCORE_ELEMENTS // (runs * heads * group * (keys[1] - keys[0])))
        blocks = [(i, min(i + step, q_len)) for i in range(0, q_len, step)]
        blocks = [tokens for tokens in blocks if mask.sees_any(tokens, keys)]
        if not blocks:
            return
        order = (0, 2, 1, 3) if _runs_first(runs, heads) else (2, 0, 1, 3)
        k = self.stage_k.load(mask.group, keys).permute(order).transpose(2, 3)
        v = self.stage_v.load(mask.group, keys).permute(order)
        for first, last in blocks:
            rows = slice(first * group, last * group)
            scores = q.new_empty(*q.shape[:2], (last - first) * group, keys[1] - keys[0])
            for i, product in enumerate(scores):
                torch.bmm(q[i, :, rows], k[i], out=product)
            mask.apply(scores if _runs_first(runs, heads) else scores.transpose(0, 1), (first, last), keys)
            state.rows(rows.start, rows.stop).update(scores, v)


def _runs_first(runs: int, heads: int) -> bool:
    """Loop over runs and batch the products over heads, or the other way round: the shorter loop.

    Neither keys nor values can be one batch over both: that would take a uniform stride, thus a copy.
    """
    return runs <= heads


def _pack(x: Tensor) -> Tensor:
    """(runs, q_len, heads_kv, group, elements) -> (runs, heads_kv, rows, elements), or heads first."""
    runs, q_len, heads, group, elements = x.shape
    order = (0, 2, 1, 3, 4) if _runs_first(runs, heads) else (2, 0, 1, 3, 4)
    outer, inner = (runs, heads) if _runs_first(runs, heads) else (heads, runs)
    return x.permute(order).reshape(outer, inner, q_len * group, elements)


def _unpack(x: Tensor, runs: int, heads: tuple[int, int]) -> Tensor:
    """The way back from :func:`_pack`: (runs, q_len, heads_q, elements)."""
    by_run = x if _runs_first(runs, heads[0]) else x.transpose(0, 1)
    return by_run.reshape(runs, heads[0], -1, heads[1], x.shape[-1]).transpose(1, 2).flatten(2, 3)
