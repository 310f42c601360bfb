"""PyTorch's own fused attention, wherever it knows the problem: the keys of a run in parts, merged by LSE.

One fused operator does what the walk takes eight for, each of which makes all threads wait for the slowest.
It is called under its ATen name because ``scaled_dot_product_attention``, which calls it too, keeps the LSE
to itself. Heads that share keys become its query rows, so that keys are read once per key/value head.

It knows no mask but a causal one that starts at the first key. That is enough: a window of one query token
is a shorter run, and under a causal mask all but the last ``q_len`` keys are seen by all query tokens. Those
are one part, without a mask; the square of the last ones is another. A sink is a part too, whose output is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flash_decoding.cpu.merge import combine
from flash_decoding.cpu.packing import Packing
from flash_decoding.cpu.runs import Group
from flash_decoding.cpu.stage import Scratch, Stage
from flash_decoding.spec import UNBOUNDED, KVCache, Options

NATIVE_ROWS = 8
"""Rows from which products in bfloat16 are about as fast as those in fp32 with keys converted in chunks.
Measured with AVX512_BF16, 16384 keys, ms in one thread: 8 rows 5 and 4, 4 rows 15 and 7, 1 row 72 and 9."""

TASKS_PER_THREAD = 4
"""Pieces to make for every thread where heads do not share out evenly."""

MIN_PIECE = 512
"""Keys below which a piece of its own is not worth it: one block of the fused operator."""

Part = tuple[Tensor, Tensor]
"""out (pieces, runs, heads_kv, rows, head_dim) and LSE (pieces, runs, heads_kv, rows)."""


def knows(cache: KVCache, options: Options) -> bool:
    """Whether calls with these options can have a group that :func:`knows_group`."""
    is_plain = options.softcap == 0 and options.alibi_slopes is None and cache.key_mask is None
    return is_plain and cache.k.shape[-1] == cache.v.shape[-1]


def knows_group(options: Options, group: Group) -> bool:
    """Whether the mask of a group is none, or a causal one under which every row sees something."""
    if group.q_len == 1:
        return True
    is_causal = options.window_right == 0 and group.shortest >= group.q_len
    return options.window_left == UNBOUNDED and (is_causal or options.window_right == UNBOUNDED)


def dtype_for(cache: KVCache, rows: int) -> torch.dtype:
    """In which dtype so many rows are multiplied with the keys.

    Never in float16: few processors have products of it, and the others take three times as long.
    """
    has_products = rows >= NATIVE_ROWS and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if cache.k.dtype == torch.bfloat16 and has_products:
        return torch.bfloat16
    return torch.promote_types(cache.k.dtype, torch.float32)


@dataclass(frozen=True)
class Fused:
    """What the groups of a call have in common."""

    cache: KVCache
    options: Options
    keys_scratch: Scratch
    values_scratch: Scratch

    @classmethod
    def of(cls, cache: KVCache, options: Options) -> Fused:
        """With memory of its own."""
        return cls(cache, options, Scratch(), Scratch())

    def attend(self, q: Tensor, group: Group, *, chunk: int, piece: int) -> tuple[Tensor, Tensor]:
        """Attention of q (runs, q_len, heads_q, head_dim), of a group with equally many keys.

        ``chunk`` bounds the keys that are copied at once, where they have to be copied, and ``piece`` those
        of one part; 0 makes as many parts as keep the threads busy. Returns out (runs, q_len, heads_q,
        head_dim) and LSE (runs, q_len, heads_q).
        """
        packing = Packing(len(group.runs), self.cache.heads, q.shape[2] // self.cache.heads)
        dtype = dtype_for(self.cache, group.q_len * packing.group)
        keys, values = (Stage(pool, self.cache.block_table, dtype) for pool in (self.cache.k, self.cache.v))
        q = q.to(dtype)
        square = group.q_len if group.q_len > 1 and self.options.window_right == 0 else 0
        seen_by_all = group.longest - square
        chunk = max(seen_by_all, 1) if keys.is_view(group) else chunk
        rows, parts = packing.rows(q), []
        for start in range(0, seen_by_all, chunk):
            span = (start, min(start + chunk, seen_by_all))
            k = keys.load(group, span, self.keys_scratch).transpose(1, 2)
            v = values.load(group, span, self.values_scratch).transpose(1, 2)
            parts += self._parts(rows, k, v, piece or _even_piece(rows, span[1] - span[0]))
        if square:
            span = (seen_by_all, group.longest)
            k = keys.load(group, span, self.keys_scratch).transpose(1, 2)
            v = values.load(group, span, self.values_scratch).transpose(1, 2)
            parts.append(self._square(q.transpose(1, 2), k, v, packing))
        if self.options.sinks is not None or not parts:
            parts.append(self._nothing(q, packing))
        out, lse = _together(parts)
        return packing.tokens(out), packing.tokens(lse[..., None])[..., 0]

    def _parts(self, rows: Tensor, k: Tensor, v: Tensor, piece: int) -> list[Part]:
        """Rows (runs, heads_kv, rows, head_dim) with keys (runs, heads_kv, keys, head_dim), all visible."""
        parts, done, keys = [], 0, k.shape[2]
        if len(rows) == 1 and piece < keys:
            # Equal pieces of a sequence are a batch of sequences: the same memory, with one more stride.
            pieces = keys // piece
            done = pieces * piece
            folded = (x[0, :, :done].view(len(x[0]), pieces, piece, -1).transpose(0, 1) for x in (k, v))
            out, lse = self._call(rows.expand(pieces, -1, -1, -1), *folded)
            parts.append((out[:, None], lse[:, None]))
        for start in range(done, keys, piece):
            out, lse = self._call(rows, k[:, :, start : start + piece], v[:, :, start : start + piece])
            parts.append((out[None], lse[None]))
        return parts

    def _square(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Part:
        """q (runs, heads_q, q_len, head_dim) with the last q_len keys, under a causal mask."""
        out, lse = self._call(q, k, v, is_causal=True)
        packed = packing.rows(out.transpose(1, 2)), packing.rows(lse[..., None].transpose(1, 2))
        return packed[0][None], packed[1][None, ..., 0]

    def _nothing(self, q: Tensor, packing: Packing) -> Part:
        """A part without keys: the sinks, or an LSE of -inf."""
        lse = q.new_full((q.shape[2],), float("-inf"), dtype=torch.float32)
        sinks = lse if self.options.sinks is None else self.options.sinks.float()
        rows = packing.rows(sinks[:, None].expand(*q.shape[:3], 1))
        return torch.zeros_like(packing.rows(q))[None], rows[None, ..., 0]

    def _call(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Part:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=self.options.softmax_scale
        )
        return out, lse


def _even_piece(rows: Tensor, keys: int) -> int:
    """Keys of a piece: all of them where threads share the heads evenly, else a few for every thread."""
    tasks, threads = rows.shape[0] * rows.shape[1] * -(-rows.shape[2] // 32), torch.get_num_threads()
    if tasks % threads == 0:
        return max(keys, MIN_PIECE)
    pieces = -(-TASKS_PER_THREAD * threads // tasks)
    return max(-(-keys // pieces), MIN_PIECE)


def _together(parts: list[Part]) -> Part:
    """Merge: out (runs, heads_kv, rows, head_dim) and LSE (runs, heads_kv, rows)."""
    if len(parts) == 1 and len(parts[0][0]) == 1:
        return parts[0][0][0], parts[0][1][0]
    outs, lses = zip(*parts, strict=True)
    return combine(torch.cat(outs), torch.cat(lses))
