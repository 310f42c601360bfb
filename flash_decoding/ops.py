"""Contracts with PyTorch: what each operator takes, gives back and writes to, and nothing of how it is done.

Importing this file registers ``torch.ops.flash_decoding.{attention, append_kv, merge_attention}``. Each has a
fake, so shapes are known while ``torch.compile`` traces; planning and launching happen in
:mod:`flash_decoding.execute`, which is imported when an operator first runs, with real sizes. The functions
at the end of the file take the records of :mod:`flash_decoding.spec` and call the operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from flash_decoding import eager, repeats
from flash_decoding.repeats import Kind
from flash_decoding.spec import KVCache, NewTokens, Options, Queries, Rotary

_ATTENTION = """attention(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table,
    Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? key_mask, Tensor? cu_seqlens_q,
    Tensor? alibi_slopes, Tensor? sinks, SymInt max_q_len, SymInt max_kv_len, SymInt new_tokens, bool dense,
    float softmax_scale, int window_left, int window_right, float softcap,
    int num_splits, bool batch_invariant, bool return_lse
) -> (Tensor out, Tensor lse)"""

_APPEND_KV = """append_kv(
    Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_seqlens, Tensor? block_table,
    Tensor? cache_batch_idx, Tensor? q, Tensor(c!)? q_rotated, Tensor? rotary_cos, Tensor? rotary_sin,
    bool rotary_interleaved, bool advance_q
) -> ()"""

_MERGE_ATTENTION = "merge_attention(Tensor outs, Tensor lses) -> (Tensor out, Tensor lse)"

R = TypeVar("R")

# Kernels follow the strides they are given and need a contiguous last dimension: a compiler that lays an
# intermediate tensor out anew would break that after the checks have passed.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("flash_decoding", "DEF")  # type: ignore[no-untyped-call]


@functools.cache
def _execute() -> ModuleType:
    from flash_decoding import execute

    return execute


def _attention(  # noqa: PLR0917 - the schema's order
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    max_q_len: int,
    max_kv_len: int,
    new_tokens: int,
    dense: bool,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    batch_invariant: bool,
    return_lse: bool,
    *,
    kind: Kind | None = None,
) -> tuple[Tensor, Tensor]:
    cache = KVCache(
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        cache_batch_idx,
        cache_leftpad,
        key_mask,
        new_tokens=new_tokens,
        max_kv_len=max_kv_len,
        dense=dense,
    )
    out, lse = _execute().attention(
        Queries(q, cu_seqlens_q, max_q_len),
        cache,
        Options(softmax_scale, window_left, window_right, softcap, alibi_slopes, sinks),
        num_splits=num_splits,
        batch_invariant=batch_invariant,
        return_lse=return_lse,
        kind=kind,
    )
    return out, lse


def _attention_fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    *front, tokens, heads_q, _ = q.shape
    return_lse = rest[-1]
    out = q.new_empty((*front, tokens, heads_q, v_cache.shape[3]))
    return out, q.new_empty((*front, heads_q, tokens) if return_lse else (0,), dtype=torch.float32)


def _append_kv(  # noqa: PLR0917 - the schema's order
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    q: Tensor | None,
    q_rotated: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    advance_q: bool,
    *,
    kind: Kind | None = None,
) -> None:
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, advance_q)
    cache = KVCache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, new_tokens=k.shape[1])
    _execute().append_kv(NewTokens(k, v, rotary, q, q_rotated), cache, kind=kind)
    _written(k_cache, v_cache, q_rotated)


def _written(*tensors: Tensor | None) -> None:
    for written in tensors:
        # So that autograd notices where somebody else's backward pass still needs the old contents.
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)


def _append_kv_fake(*_: object) -> None:
    """Writing gives nothing back, so there is no shape to infer."""


def _merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _execute().merge(outs, lses)
    return out, lse


def _merge_attention_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _on_its_gpu(run: Callable[..., R]) -> Callable[..., R]:
    """Run with the GPU of the first tensor as the current one, which is where Triton launches."""

    @functools.wraps(run)
    def guarded(first: Tensor, *rest: object) -> R:
        if first.get_device() == torch.cuda.current_device():
            return run(first, *rest)
        with torch.cuda.device(first.device):
            return run(first, *rest)

    return guarded


def _attention_again(*call: Any) -> tuple[Tensor, Tensor]:
    kind, addresses = repeats.kind_of(call[:11], ("attention", *call[11:]))
    steps = repeats.find(kind)
    if steps is None:
        return _attention(*call, kind=kind)
    out, lse = steps(addresses)
    return out, out.new_empty(0, dtype=torch.float32) if lse is None else lse


def _append_kv_again(*call: Any) -> None:
    kind, addresses = repeats.kind_of(call[:11], ("append_kv", *call[11:]))
    steps = repeats.find(kind)
    if steps is None:
        _append_kv(*call, kind=kind)
        return
    steps(addresses)
    _written(call[2], call[3], call[8])


_IMPLEMENTATIONS: tuple[
    tuple[str, Callable[..., object], Callable[..., object], Callable[..., object]], ...
] = (
    (_ATTENTION, _attention, _attention_again, _attention_fake),
    (_APPEND_KV, _append_kv, _append_kv_again, _append_kv_fake),
    (_MERGE_ATTENTION, _merge_attention, _merge_attention, _merge_attention_fake),
)
for _schema, _run, _run_on_gpu, _fake in _IMPLEMENTATIONS:
    _name = _library.define(_schema, tags=_TAGS)  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CPU")  # type: ignore[no-untyped-call]
    _library.impl(_name, _on_its_gpu(_run_on_gpu), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flash_decoding::{_name}", _fake, lib=_library)


def attention(
    queries: Queries,
    cache: KVCache,
    options: Options,
    *,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = True,
    kind: Kind | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``queries`` over ``cache``: out, and the LSE or an empty tensor in its place.

    The records have been checked by :mod:`flash_decoding.validate`; nothing is checked here.
    Only calls that are alone (:mod:`~flash_decoding.eager`) have a ``kind``, and launches are kept under it.
    """
    call = (
        queries.q,
        cache.k,
        cache.v,
        cache.cache_seqlens,
        cache.block_table,
        cache.cache_batch_idx,
        cache.cache_leftpad,
        cache.key_mask,
        queries.cu_seqlens_q,
        options.alibi_slopes,
        options.sinks,
        queries.max_q_len,
        cache.max_kv_len,
        cache.new_tokens,
        cache.dense,
        options.softmax_scale,
        options.window_left,
        options.window_right,
        options.softcap,
        num_splits,
        batch_invariant,
        return_lse,
    )
    if kind is not None:
        return _attention(*call, kind=kind)
    if eager.is_alone(call[:11]):
        return _attention_again(*call)
    out, lse = torch.ops.flash_decoding.attention.default(*call)
    return out, lse


def append_kv(new: NewTokens, cache: KVCache) -> None:
    """Write new tokens behind ``cache.cache_seqlens``, and rotated queries to ``new.q_rotated``."""
    rotary = new.rotary
    call = (
        new.k,
        new.v,
        cache.k,
        cache.v,
        cache.cache_seqlens,
        cache.block_table,
        cache.cache_batch_idx,
        new.q,
        new.q_rotated,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
        False if rotary is None else rotary.interleaved,
        True if rotary is None else rotary.advance_q,
    )
    if eager.is_alone(call[:11]):
        _append_kv_again(*call)
    else:
        torch.ops.flash_decoding.append_kv.default(*call)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge (splits, batch, q_len, heads_q, head_dim_v) partial results by their LSEs."""
    out, lse = torch.ops.flash_decoding.merge_attention.default(outs, lses)
    return out, lse
