"""flash-attn 2.8's functions, forward only: change the import, keep the call.

Names, order and defaults of the parameters are flash-attn's, and so is their meaning; ``sinks`` is added, by
keyword. What differs is said here once:

- A row that sees no key has LSE -inf (flash-attn: +inf); its output is 0 in both.
- Pages may have any size; ``cache_leftpad`` and ``cache_batch_idx`` work with pages too; float32 works;
  values may have a head_dim of their own. With pages, ``cache_batch_idx`` is the row of the block table.
- The head_dim has to be a multiple of 8: flash-attn copies K and V into wider tensors where it is not.
- Arguments that flash-attn would leave unread (``v`` without ``k``, rotary tables without ``k``) are refused.
- Backward and dropout are refused; ``deterministic`` is accepted, since every forward here is deterministic.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from flash_decoding import ops, validate
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.spec import UNBOUNDED, KVCache, Options, Queries, Rotary

T = TypeVar("T", Tensor, Tensor | None)
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_with_kvcache(  # noqa: PLR0917 - flash-attn's order
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append ``k`` and ``v`` to a cache in place (if given), then attend to the cache and the new tokens.

    Args:
        q: (batch, q_len, heads_q, head_dim).
        k_cache: (cache_batch, capacity, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim) with
            ``block_table``; written to where ``k`` is given.
        v_cache: as ``k_cache``.
        k: (batch, new_len, heads_kv, head_dim), written to the slots from ``cache_seqlens`` on.
        v: as ``k``.
        rotary_cos: (positions, rotary_dim // 2), at least a position per slot; rotates ``k`` by slot and
            ``q`` from ``cache_seqlens`` on. Without a causal mask and without a window narrower than the
            cache, every query token is rotated by ``cache_seqlens`` itself.
        rotary_sin: as ``rotary_cos``.
        cache_seqlens: (batch,) int32 or an int: live slots before the append, left as they are; None for the
            whole capacity.
        cache_batch_idx: (batch,) int32, the row of the cache (or of the block table) a sequence uses.
        cache_leftpad: (batch,) int32, the first slot in use.
        block_table: (batch, max_pages) int32, the page of each ``page_size`` slots.
        softmax_scale: factor of the scores; None for ``head_dim ** -0.5``.
        causal: bottom-right aligned causal mask.
        window_size: (left, right), inclusive and bottom-right aligned; -1 is unbounded.
        softcap: ``softcap * tanh(score / softcap)`` where > 0.
        rotary_interleaved: rotate neighbours (2i, 2i + 1), else halves (i, i + rotary_dim // 2).
        alibi_slopes: (heads_q,) or (batch, heads_q) float32.
        num_splits: programs that share the keys of a sequence and head; 0 lets the planner choose.
        return_softmax_lse: also return the LSE.
        sinks: (heads_q,) float32, bfloat16 or float16, a logit per head that joins the denominator only.

    Returns:
        out, (batch, q_len, heads_q, head_dim_v); with ``return_softmax_lse`` also the LSE, (batch, heads_q,
        q_len) float32, natural logarithm.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device, stride or value; nothing was written.
        Unsupported: a tensor requires grad, or nothing here can run the call.
    """
    queries = validate.queries(_last_contiguous(q))
    k, v = _last_contiguous(k), _last_contiguous(v)
    new_len = validate.new_len(k, v)
    if k is not None and cache_seqlens is None:
        raise InvalidInput("cache_seqlens", None, "an int or a (batch,) int32 tensor: where k and v go")
    if k is None and (rotary_cos is not None or rotary_sin is not None):
        raise InvalidInput("rotary_cos", "rotary tables without k and v", "k and v too, or no tables")
    cache = validate.kv_cache(
        queries,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=_last_contiguous(block_table),
        cache_batch_idx=_last_contiguous(cache_batch_idx),
        cache_leftpad=cache_leftpad,
        new_len=new_len,
    )
    options = validate.options(
        queries,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    validate.num_splits(num_splits)
    if k is not None and v is not None:
        advance_q = causal or any(0 <= side < cache.capacity for side in window_size)
        rotation = validate.rotary(
            rotary_cos, rotary_sin, interleaved=rotary_interleaved, advance_q=advance_q
        )
        queries = _append(queries, cache, k, v, rotation)
    out, lse = ops.attention(queries, cache, options, num_splits=num_splits, return_lse=return_softmax_lse)
    return (out, lse) if return_softmax_lse else out


def flash_attn_func(  # noqa: PLR0917 - flash-attn's order
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """Attention of a dense batch.

    Args:
        q: (batch, q_len, heads_q, head_dim).
        k: (batch, kv_len, heads_kv, head_dim).
        v: (batch, kv_len, heads_kv, head_dim_v).
        dropout_p: 0; anything else is refused.
        softmax_scale: factor of the scores; None for ``head_dim ** -0.5``.
        causal: bottom-right aligned causal mask.
        window_size: (left, right), inclusive and bottom-right aligned; -1 is unbounded.
        softcap: ``softcap * tanh(score / softcap)`` where > 0.
        alibi_slopes: (heads_q,) or (batch, heads_q) float32.
        deterministic: about flash-attn's backward; the forward is deterministic either way.
        return_attn_probs: also return the LSE and an empty tensor in the place of dropout's pattern.
        sinks: (heads_q,) float32, bfloat16 or float16, a logit per head that joins the denominator only.

    Returns:
        out, (batch, q_len, heads_q, head_dim_v); with ``return_attn_probs`` (out, lse, empty), lse
        (batch, heads_q, q_len) float32.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device, stride or value.
        Unsupported: dropout, a tensor that requires grad, or nothing here can run the call.
    """
    _refuse_dropout(dropout_p)
    queries = validate.queries(_last_contiguous(q))
    k, v = _last_contiguous(k), _last_contiguous(v)
    cache = validate.dense_keys(queries, k, v)
    options = validate.options(
        queries,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return _forward(queries, cache, options, return_attn_probs)


def flash_attn_varlen_func(  # noqa: PLR0917 - flash-attn's order
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNBOUNDED, UNBOUNDED),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
) -> Result:
    """Attention of sequences of different lengths, packed one after the other.

    Args:
        q: (total_q, heads_q, head_dim).
        k: (total_k, heads_kv, head_dim), or (pages, page_size, heads_kv, head_dim) with ``block_table``.
        v: as ``k``, with a head_dim of its own if need be.
        cu_seqlens_q: (batch + 1,) int32: sequence ``b`` owns ``q[cu_seqlens_q[b]:cu_seqlens_q[b + 1]]``.
        cu_seqlens_k: (batch + 1,) int32: the same for ``k``; with pages, its differences are the lengths.
        max_seqlen_q: the most query tokens of one sequence (or more).
        max_seqlen_k: the most keys of one sequence (or more).
        dropout_p: this and all up to ``return_attn_probs``, as in :func:`flash_attn_func`.
        block_table: (batch, max_pages) int32, the page of each ``page_size`` keys.
        sinks: (heads_q,) float32, bfloat16 or float16, a logit per head that joins the denominator only.

    Returns:
        out, (total_q, heads_q, head_dim_v); with ``return_attn_probs`` (out, lse, empty), lse (heads_q,
        total_q) float32.

    Raises:
        InvalidInput: an argument has a wrong shape, dtype, device, stride or value.
        Unsupported: dropout, a tensor that requires grad, or nothing here can run the call.
    """
    _refuse_dropout(dropout_p)
    queries = validate.ragged_queries(_last_contiguous(q), cu_seqlens_q, max_seqlen_q, "max_seqlen_q")
    k, v = _last_contiguous(k), _last_contiguous(v)
    cache = validate.packed_keys(
        queries, k, v, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, block_table=block_table
    )
    options = validate.options(
        queries,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    return _forward(queries, cache, options, return_attn_probs)


def _append(queries: Queries, cache: KVCache, k: Tensor, v: Tensor, rotation: Rotary | None) -> Queries:
    """Write new tokens behind the live slots; the queries that come back are rotated if there are tables."""
    q = None if rotation is None else queries.q
    new = validate.new_tokens(k, v, cache, rotation=rotation, q=q)
    ops.append_kv(new, cache)
    return queries if new.q_rotated is None else Queries(new.q_rotated)


def _forward(queries: Queries, cache: KVCache, options: Options, return_attn_probs: bool) -> Result:
    out, lse = ops.attention(queries, cache, options, return_lse=return_attn_probs)
    return (out, lse, out.new_empty(0)) if return_attn_probs else out


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p != 0.0:
        why = "inference drops nothing: pass dropout_p=0.0, as flash-attn asks for in evaluation"
        raise Unsupported(f"dropout_p={dropout_p}", (why,))


def _last_contiguous(x: T) -> T:
    """Copy what has no contiguous last dimension, as flash-attn does; caches are never copied."""
    if isinstance(x, Tensor) and x.ndim > 0 and x.stride(-1) != 1 and x.shape[-1] > 1:
        return x.contiguous()
    return x
