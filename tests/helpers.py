"""What "close enough" means, in one place; with the input factory, all that a test of attention needs.

How the tolerance is derived. The result is compared with the reference in float64, sequence by sequence,
since long sequences have small outputs that a common bound would not see. The budget is what plain PyTorch
loses on the same inputs in the same dtype (:func:`eager_attend`): three times its largest error, and twice
its RMS error, which a few lucky elements cannot hide. Where eager PyTorch happens to be exact (a single key)
two things remain: rounding the output, up to one unit in its last place, and the handful of roundings of a
weight on its way (scale, difference, exponential, sum, quotient), 8 * u, with u the unit roundoff of fp32, or
of float64 for float64 inputs, where the reference itself has no better. And eager PyTorch may sum the keys in
blocks where another path adds them one by one: sqrt(keys) * u, the random walk of that many roundings.

The LSE never passes through the low-precision dtype, so it is held to what fp32 sums can lose:

- scores: a dot product of n terms is off by at most n * u * |q| |k| in any order of summation (u = 2**-24);
- the sum of exponentials: sqrt(keys) * u, the random walk of that many roundings, and 8 * u for the exp2
  and log2 of the hardware;
- the LSE itself: it is rounded a few times on its way, 4 * u of its size;
- on a CPU in bfloat16, the cubic that PyTorch's fused attention has for an exponential there: 2**-13.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.spec import KVCache, Options, Queries
from tests.inputs import WILD_PAGES, Case, Inputs, exists, in_layout, make_inputs

__all__ = [
    "WILD_PAGES",
    "Case",
    "Inputs",
    "assert_close_to_reference",
    "eager_attend",
    "in_layout",
    "live_tokens",
    "make_inputs",
    "query_tokens",
]

UNIT_FP32 = 2.0**-24


def assert_close_to_reference(
    out: Tensor, lse: Tensor | None, queries: Queries, cache: KVCache, options: Options
) -> None:
    """Assert that ``out`` and ``lse`` have the right shape and dtype and are as exact as they can be.

    Rows that see nothing must be exactly 0, with an LSE of exactly -inf. ``lse=None`` checks ``out`` alone.
    """
    want, want_lse = reference.attend(queries, cache, options)
    eager, _ = eager_attend(queries, cache, options, queries.q.dtype)
    assert out.shape == want.shape, (out.shape, want.shape)
    assert out.dtype == queries.q.dtype
    for b in range(queries.batch):
        rows = _rows(queries, b)
        keys = live_tokens(cache, b)[0].shape[0]
        _assert_out(out[rows], want[rows], eager[rows], keys, f"out of sequence {b}")
    if lse is None:
        return
    assert lse.shape == want_lse.shape, (lse.shape, want_lse.shape)
    assert lse.dtype == torch.float32
    for b in range(queries.batch):
        rows = _rows(queries, b)
        got, ideal = (x[:, rows] if queries.is_ragged else x[rows] for x in (lse, want_lse))
        bound = _lse_bound(query_tokens(queries, b), live_tokens(cache, b)[0], options)
        _assert_lse(got, ideal, bound, f"lse of sequence {b}")
    nothing = (want_lse if queries.is_ragged else want_lse.movedim(1, 0).flatten(1)).transpose(
        0, 1
    ) == -math.inf
    assert (out.flatten(0, -3)[nothing] == 0).all(), "a row that sees nothing must be 0"


def _rows(queries: Queries, b: int) -> slice | int:
    if queries.cu_seqlens_q is None:
        return b
    return slice(*queries.cu_seqlens_q[b : b + 2].tolist())


def _assert_out(got: Tensor, want: Tensor, eager: Tensor, keys: int, what: str) -> None:
    if got.numel() == 0:
        return
    unit = 2.0**-53 if got.dtype == torch.float64 else UNIT_FP32
    floor = torch.finfo(got.dtype).eps + (8 + math.sqrt(keys)) * unit
    error, lost = got.to(want.dtype) - want, eager.to(want.dtype) - want
    largest, budget = error.abs().max(), 3 * lost.abs().max() + floor * want.abs().max()
    assert largest <= budget, f"{what}: largest error {largest:.3g}, budget {budget:.3g}"
    rms, budget = _rms(error), 2 * _rms(lost) + floor * _rms(want)
    assert rms <= budget, f"{what}: RMS error {rms:.3g}, budget {budget:.3g}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _assert_lse(got: Tensor, want: Tensor, bound: float, what: str) -> None:
    seen = want != -math.inf
    assert ((got != -math.inf) == seen).all(), f"{what}: -inf exactly where a row sees nothing"
    want, error = want[seen], (got[seen].to(want.dtype) - want[seen]).abs()
    excess = error - bound - 4 * UNIT_FP32 * want.abs()
    assert (excess <= 0).all(), f"{what}: error {error.max():.3g}, beyond the bound {bound:.3g}"


def _lse_bound(q: Tensor, k: Tensor, options: Options) -> float:
    if k.numel() == 0 or q.numel() == 0:
        return 0.0
    product = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max())
    score_error = q.shape[-1] * UNIT_FP32 * abs(options.softmax_scale) * product
    exponential = 2.0**-13 if q.device.type == "cpu" and q.dtype == torch.bfloat16 else 0.0
    return score_error + (math.sqrt(k.shape[0]) + 8) * UNIT_FP32 + exponential


def eager_attend(
    queries: Queries, cache: KVCache, options: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Textbook attention of every sequence in ``dtype``: whole score matrix, mask, softmax, product.

    Written apart from ``reference.attend`` on purpose: it measures what plain PyTorch loses in ``dtype``, and
    in float64 it is a second opinion. Statistics of the softmax are at least fp32, as in every framework.
    """
    pieces = [_eager_sequence(queries, cache, options, b, dtype) for b in range(queries.batch)]
    outs, lses = zip(*pieces, strict=True)
    if queries.is_ragged:
        return torch.cat(outs), torch.cat(lses, dim=1)
    return torch.stack(outs), torch.stack(lses)


def _eager_sequence(
    queries: Queries, cache: KVCache, options: Options, b: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    q = query_tokens(queries, b).to(dtype).transpose(0, 1)
    k, v, slots, length = live_tokens(cache, b)
    group = queries.heads // cache.heads
    k, v = (x.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    stats = torch.promote_types(dtype, torch.float32)
    scores = (q @ k.transpose(1, 2)).to(stats) * options.softmax_scale
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    ahead = slots[None, :] - (length - q.shape[1] + torch.arange(q.shape[1], device=q.device))[:, None]
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.expand(queries.batch, -1)[b].to(stats)
        scores = scores - slopes[:, None, None] * ahead.abs()
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if options.window_left >= 0:
        hidden |= ahead < -options.window_left
    if options.window_right >= 0:
        hidden |= ahead > options.window_right
    scores = scores.masked_fill(hidden, -math.inf)
    sinks = scores.new_full((queries.heads,), -math.inf) if options.sinks is None else options.sinks.to(stats)
    scores = torch.cat((sinks[:, None, None].expand(-1, q.shape[1], 1), scores), dim=2)
    lse = torch.logsumexp(scores, dim=2)
    weights = torch.softmax(scores, dim=2).masked_fill(lse[..., None] == -math.inf, 0.0)
    return (weights[..., 1:].to(dtype) @ v).transpose(0, 1), lse


def query_tokens(queries: Queries, b: int) -> Tensor:
    """(q_len, heads_q, head_dim) of sequence ``b``."""
    if queries.cu_seqlens_q is None:
        return queries.q[b]
    start, stop = queries.cu_seqlens_q[b : b + 2].tolist()
    return queries.q[start:stop]


def live_tokens(cache: KVCache, b: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Keys and values (tokens, heads_kv, elements) of sequence ``b``, their slots, and its length."""
    row = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
    start = 0 if cache.cache_leftpad is None else int(cache.cache_leftpad[b])
    length = min(int(cache.cache_seqlens[b]) + cache.new_tokens, cache.capacity)
    slots = torch.arange(start, max(start, length), device=cache.k.device)
    slots = slots[exists(cache, b, slots)]
    if cache.block_table is None:
        return cache.k[row, slots], cache.v[row, slots], slots, length
    pages = cache.block_table[row, slots // cache.page_size].long()
    return cache.k[pages, slots % cache.page_size], cache.v[pages, slots % cache.page_size], slots, length
