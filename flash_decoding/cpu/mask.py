"""Everything that happens to scores between the two products: softcap, ALiBi, windows, padding, holes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.cpu.packing import Packing
from flash_decoding.cpu.runs import Group, existing
from flash_decoding.spec import Options

Span = tuple[int, int]
"""A half-open range of query tokens, or of keys in their runs."""


@dataclass(frozen=True)
class Mask:
    """The options, seen by one group of runs."""

    options: Options
    group: Group
    packing: Packing
    key_mask: Tensor | None = None

    def sees_any(self, tokens: Span, keys: Span) -> bool:
        """False only where no token sees any of the keys, in any run."""
        left, right = self.options.window_left, self.options.window_right
        furthest_back = keys[1] - 1 - self._position(self.group.shortest, tokens[0])
        furthest_ahead = keys[0] - self._position(self.group.longest, tokens[1] - 1)
        return not (0 <= right < furthest_ahead or (left >= 0 and furthest_back < -left))

    def sees_all(self, tokens: Span, keys: Span) -> bool:
        """True only where every token sees all of the keys, in every run."""
        left, right = self.options.window_left, self.options.window_right
        ahead = keys[1] - 1 - self._position(self.group.shortest, tokens[0])
        back = keys[0] - self._position(self.group.longest, tokens[1] - 1)
        is_whole = self.key_mask is None and keys[1] <= self.group.shortest
        return is_whole and not (0 <= right < ahead or (left >= 0 and back < -left))

    def _position(self, keys: int, token: int) -> int:
        """Key under a query token, in a run of so many keys."""
        return keys - self.group.q_len + token

    def apply(self, scores: Tensor, tokens: Span, keys: Span) -> None:
        """Turn products, already scaled, into scores, in place; hidden ones become -inf.

        ``scores`` is packed: (runs, heads_kv, tokens * group, keys).
        """
        softcap = self.options.softcap
        if softcap > 0:
            scores.div_(softcap).tanh_().mul_(softcap)
        slopes, sees_all = self.options.alibi_slopes, self.sees_all(tokens, keys)
        if sees_all and slopes is None:
            return
        by_token = scores.view(*scores.shape[:2], -1, self.packing.group, scores.shape[-1])
        lengths = torch.tensor([run.keys for run in self.group.runs])[:, None, None]
        slots = torch.arange(*keys)
        ahead = slots - (lengths - self.group.q_len + torch.arange(*tokens)[:, None])
        if slopes is not None:
            distance = ahead.abs()[:, None, :, None].to(scores.dtype)
            by_token.addcmul_(distance, self._of_runs(slopes).to(scores.dtype), value=-1)
        if not sees_all:
            hidden = self._hidden(ahead) | (slots >= lengths)
            if self.key_mask is not None:
                hidden = hidden | ~existing(self.key_mask, self.group, keys)[:, None]
            by_token.masked_fill_(hidden[:, None, :, None], -math.inf)

    def _of_runs(self, slopes: Tensor) -> Tensor:
        """(runs or 1, heads_kv, 1, group, 1)."""
        if slopes.dim() == 2:
            slopes = slopes[[run.sequence for run in self.group.runs]]
        return slopes.reshape(-1, self.packing.heads, 1, self.packing.group, 1)

    def _hidden(self, ahead: Tensor) -> Tensor:
        left, right = self.options.window_left, self.options.window_right
        hidden = ahead > right if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        return hidden | (ahead < -left) if left >= 0 else hidden
