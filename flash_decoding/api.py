"""The public functions: check, build the records, call the operators.

Shapes follow the legend of :mod:`flash_decoding.spec`. All functions refuse what they cannot honour with
:class:`~flash_decoding.errors.InvalidInput` or :class:`~flash_decoding.errors.Unsupported`, before anything
is written. None of them waits for the device; all of them trace under ``torch.compile(fullgraph=True)`` and
can be captured in a CUDA graph, which then holds for every length up to the capacity.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_decoding import calls, ops, validate
from flash_decoding.errors import InvalidInput
from flash_decoding.spec import UNBOUNDED


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    key_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its KV cache.

    Args:
        q: (batch, q_len, heads_q, head_dim) float16, bfloat16 or float32 (float64 too on a CPU). The last
            query token attends from the last live slot, the others from the slots before it.
        k_cache: (cache_batch, capacity, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim) with
            ``block_table``; dtype and device of q; only the last dimension has to be contiguous.
        v_cache: as ``k_cache``, with a head_dim of its own if need be.
        cache_seqlens: live slots: (batch,) int32, an int for all sequences, or None for the whole capacity.
        block_table: (batch, max_pages) int32, the page of each ``page_size`` slots.
        cache_batch_idx: (batch,) int32, the row of the cache (or of the block table) a sequence uses.
        cache_leftpad: (batch,) int32, the first slot in use.
        key_mask: (batch, columns) bool: slots that are False, or lie beyond its columns, do not exist.
        softmax_scale: factor of the scores; None for ``head_dim ** -0.5``.
        causal: hide later tokens from earlier ones (bottom-right aligned).
        window_size: (left, right) slots visible beside a query token's own; -1 is unbounded.
        softcap: ``softcap * tanh(score / softcap)`` where > 0.
        alibi_slopes: (heads_q,) or (batch, heads_q) float32: ``slope * distance`` is subtracted.
        sinks: (heads_q,) float32, bfloat16 or float16, a logit per head that joins the denominator only.
        num_splits: programs that share the keys of one sequence and head; 0 lets the planner choose.
        batch_invariant: give a sequence the same bits whatever else is in the batch.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        out, (batch, q_len, heads_q, head_dim_v) in the dtype of q; with ``return_lse`` also lse, (batch,
        heads_q, q_len) float32, natural logarithm. A row that sees no key has out 0 and lse -inf.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device, stride or value.
        Unsupported: a tensor requires grad (there is no backward), or nothing here can run the call.
    """
    tensors = (
        q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, key_mask, None,
        alibi_slopes, sinks,
    )  # fmt: skip
    return calls.attend(
        tensors, (0, softmax_scale, causal, softcap, num_splits, batch_invariant, return_lse), window_size
    )


def decode_attention_varlen(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_seqlens_q: Tensor,
    max_q_len: int,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    key_mask: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`decode_attention` for sequences that bring different numbers of query tokens.

    Args:
        q: (total_q, heads_q, head_dim), the query tokens of all sequences one after the other.
        k_cache: as in :func:`decode_attention`.
        v_cache: as in :func:`decode_attention`.
        cu_seqlens_q: (batch + 1,) int32: sequence ``b`` owns ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``,
            which may be empty.
        max_q_len: the most query tokens of one sequence; a larger number costs work, not correctness.
        cache_seqlens: this and all that follow, as in :func:`decode_attention`.

    Returns:
        out, (total_q, heads_q, head_dim_v); with ``return_lse`` also lse, (heads_q, total_q) float32.

    Raises:
        InvalidInput: as in :func:`decode_attention`.
        Unsupported: as in :func:`decode_attention`.
    """
    tensors = (
        q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, key_mask,
        cu_seqlens_q, alibi_slopes, sinks,
    )  # fmt: skip
    numbers = (max_q_len, softmax_scale, causal, softcap, num_splits, batch_invariant, return_lse)
    return calls.attend(tensors, numbers, window_size, ragged=True)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: int | Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    advance_q: bool = True,
) -> Tensor | None:
    """Write new keys and values into a cache, in place, behind the live slots of each sequence.

    ``cache_seqlens`` is left as it is: advance it before attending to the new tokens. A token whose slot
    would lie beyond the capacity is refused where lengths are ints (or in checking mode), and dropped where
    they are on the device.

    Args:
        k: (batch, new_len, heads_kv, head_dim), dtype and device of the cache.
        v: (batch, new_len, heads_kv, head_dim_v).
        k_cache: written to; contiguous or paged, as in :func:`decode_attention`.
        v_cache: written to.
        cache_seqlens: (batch,) int32 or an int: the slot that the first new token goes to.
        block_table: (batch, max_pages) int32 of a paged cache.
        cache_batch_idx: (batch,) int32, the row of the cache (or of the block table) a sequence uses.
        q: (batch, q_len, heads_q, head_dim), queries to be rotated alongside; only with rotary tables.
        rotary_cos: (positions, rotary_dim // 2), at least one position per slot; dtype of k.
        rotary_sin: as ``rotary_cos``.
        rotary_interleaved: rotate neighbours (2i, 2i + 1) instead of halves (i, i + rotary_dim // 2).
        advance_q: query token ``i`` is at position ``cache_seqlens + i``; if False all are at cache_seqlens.

    Returns:
        The rotated q, contiguous; None without q.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device, stride or value; nothing was written.
        Unsupported: a tensor requires grad, or lies on a device that nothing here runs on.
    """
    cache = validate.append_cache(
        k,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
    )
    rotation = validate.rotary(rotary_cos, rotary_sin, interleaved=rotary_interleaved, advance_q=advance_q)
    new = validate.new_tokens(k, v, cache, rotation=rotation, q=q)
    ops.append_kv(new, cache)
    return new.q_rotated


def merge_attention(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge partial results over disjoint keys into the result over all of them, by their LSEs.

    Args:
        outs: (splits, batch, q_len, heads_q, head_dim_v), or ragged: (splits, total_q, heads_q, head_dim_v);
            also a sequence of tensors without the first dimension.
        lses: (splits, batch, heads_q, q_len) or (splits, heads_q, total_q) float32; or a sequence.

    Returns:
        out and lse without the leading dimension, out in the dtype of ``outs``. Parts that saw no key (lse
        -inf) count for nothing; where no part saw a key, out is 0 and lse -inf.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device or stride.
        Unsupported: a tensor requires grad.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    validate.partials(outs, lses)
    if outs.ndim == 5:
        return ops.merge(outs, lses)
    out, lse = ops.merge(outs.unsqueeze(1), lses.unsqueeze(1))
    return out.squeeze(0), lse.squeeze(0)


def warmup(
    *,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    q_lens: Sequence[int] = (1,),
    page_sizes: Sequence[int] = (0,),
    device: torch.device | str | None = None,
) -> None:
    """Compile the kernels that calls of these sizes will use, so that the first call does not wait for them.

    Args:
        heads_q: query heads; a multiple of heads_kv.
        heads_kv: key/value heads.
        head_dim: elements of a query or key vector.
        head_dim_v: elements of a value vector; head_dim if None.
        dtype: of queries and cache.
        q_lens: query tokens per sequence, each that will occur.
        page_sizes: tokens in a page, each that will occur; 0 stands for a contiguous cache.
        device: where the kernels will run; None for the current GPU. On a CPU there is nothing to compile.

    Raises:
        InvalidInput: sizes that no call could have.
        Unsupported: nothing here runs such calls on the device.
    """
    from flash_decoding import execute

    validate.sizes(heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim, head_dim_v=head_dim_v)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cpu":
        return
    for q_len, page_size in itertools.product(q_lens, page_sizes):
        q = torch.zeros(1, q_len, heads_q, head_dim, dtype=dtype, device=place)
        k, v = (q.new_zeros(1, page_size or 1, heads_kv, dim) for dim in (head_dim, head_dim_v or head_dim))
        table = torch.zeros(1, 1, dtype=torch.int32, device=place) if page_size else None
        queries = validate.queries(q)
        cache = validate.kv_cache(queries, k, v, cache_seqlens=0, block_table=table)
        with torch.cuda.device(place):
            execute.warmup(queries, cache, validate.options(queries, causal=True))
            execute.append_kv(validate.new_tokens(k[:, :1], v[:, :1], cache), cache)


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    if len(parts) == 0 or any(part.shape != parts[0].shape for part in parts):
        shapes = [tuple(part.shape) for part in parts]
        raise InvalidInput(name, f"shapes {shapes}", "one tensor or more, all of one shape")
    return torch.stack(tuple(parts))
