"""One group of sequences, from its queries to its result: the keys pass by in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.cpu.mask import Mask, Span
from flash_decoding.cpu.packing import Packing
from flash_decoding.cpu.runs import Group
from flash_decoding.cpu.softmax import Softmax
from flash_decoding.cpu.stage import Scratch, Stage
from flash_decoding.spec import KVCache, Options

SCORE_ELEMENTS = 2**19
"""Scores in one step: 2 MB in fp32, which the CPU's cache holds. It bounds the memory of a long prompt."""


@dataclass(frozen=True)
class Walk:
    """What the groups of a call have in common."""

    options: Options
    keys: Stage
    values: Stage
    heads: int
    """Key/value heads."""
    scratch: Scratch
    spare: Scratch
    key_mask: Tensor | None

    @classmethod
    def of(cls, cache: KVCache, options: Options) -> Walk:
        """A walk over a cache, with memory of its own."""
        dtype = torch.promote_types(cache.k.dtype, torch.float32)
        mask = cache.key_mask
        keys, values = (Stage(pool, cache.block_table, dtype, mask) for pool in (cache.k, cache.v))
        return cls(options, keys, values, cache.heads, Scratch(), Scratch(), mask)

    def attend(self, q: Tensor, group: Group, chunk: int) -> tuple[Tensor, Tensor]:
        """Attention of q (runs, q_len, heads_q, head_dim), ``chunk`` keys at a time.

        Returns out (runs, q_len, heads_q, head_dim_v) and LSE (runs, q_len, heads_q).
        """
        packing = Packing(q.shape[0], self.heads, q.shape[2] // self.heads)
        rows = packing.ordered(packing.rows(q.to(self.keys.dtype) * self.options.softmax_scale))
        state = Softmax.empty(rows, self.values.pool.shape[-1])
        if self.options.sinks is not None:
            sinks = self.options.sinks.to(rows.dtype)[:, None].expand(*q.shape[:3], 1)
            state.add_sink(packing.ordered(packing.rows(sinks)))
        mask = Mask(self.options, group, packing, self.key_mask)
        for start in range(0, group.longest, chunk):
            self._take_in(state, rows, mask, (start, min(start + chunk, group.longest)))
        out, lse = (packing.tokens(packing.ordered(x)) for x in state.finish())
        return out, lse[..., 0]

    def _take_in(self, state: Softmax, q: Tensor, mask: Mask, span: Span) -> None:
        """One chunk of keys, for the rows that see any of it."""
        packing, keys = mask.packing, span[1] - span[0]
        blocks = _blocks(mask, span)
        if not blocks:
            return
        k = packing.ordered(self.keys.load(mask.group, span, self.scratch).transpose(1, 2)).transpose(2, 3)
        v = None
        if len(blocks) > 1:
            v = packing.ordered(self.values.load(mask.group, span, self.spare).transpose(1, 2))
        for tokens in blocks:
            rows = slice(tokens[0] * packing.group, tokens[1] * packing.group)
            scores = q.new_empty(*q.shape[:2], rows.stop - rows.start, keys)
            for i, product in enumerate(scores):
                torch.bmm(q[i, :, rows], k[i], out=product)
            mask.apply(packing.ordered(scores), tokens, span)
            if v is None:
                # The only block is done with the keys: their memory, still in the CPU's cache, serves twice.
                v = packing.ordered(self.values.load(mask.group, span, self.scratch).transpose(1, 2))
            state.rows(rows).update(scores, v)


def _blocks(mask: Mask, span: Span) -> list[Span]:
    """Query tokens that see any of the keys, in blocks of SCORE_ELEMENTS."""
    packing, q_len = mask.packing, mask.group.q_len
    per_token = packing.runs * packing.heads * packing.group * (span[1] - span[0])
    step = max(1, SCORE_ELEMENTS // per_token)
    blocks = [(first, min(first + step, q_len)) for first in range(0, q_len, step)]
    return [tokens for tokens in blocks if mask.sees_any(tokens, span)]
