"""The attention function that Transformers' layers call for us: their arguments become our records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flash_decoding import ops, validate
from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.spec import UNBOUNDED, KVCache, Options, Queries
from flash_decoding.transformers.bounds import Bounds, unpack
from flash_decoding.transformers.handle import CachedKeys

HONOURED = frozenset({"scaling", "is_causal", "sliding_window", "softcap", "s_aux"})
"""Arguments that attention acts on."""

HARMLESS: Mapping[str, str] = {
    "position_ids": "rotary embeddings have been applied; the order of keys is that of slots",
    "cache_position": "where the cache has written; lengths come from the mask and the cache",
    "position_embeddings": "applied before attention",
    "use_cache": "the cache's business",
    "output_hidden_states": "the model's business",
    "output_router_logits": "the model's business",
    "return_dict": "the model's business",
    "logits_to_keep": "the model's business",
    "num_items_in_batch": "the loss's business",
    "layer_idx": "names the layer",
    "deterministic": "every forward here is",
}
"""Arguments that models pass along and that cannot change what attention computes, with why."""

_REFUSED: Mapping[str, str] = {
    "output_attentions": "weights are never written; attn_implementation='eager' writes them",
    "head_mask": "heads cannot be switched off; attn_implementation='eager' can",
    "position_bias": "biases of the scores are not known here",
    "cu_seq_lens_q": "packed sequences are not known here; pad them, or flash_decoding.flash_attn has them",
    "dropout": "forward only: call model.eval()",
    "cache": "models of Transformers before 5.24 know it as past_key_values",
}
"""What would do, for arguments that are refused often. One that is in no table here is refused too."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor | CachedKeys,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer of a Transformers model.

    Args:
        module: the layer; its ``is_causal`` (True if it has none) holds where the argument is absent.
        query: (batch, heads_q, q_len, head_dim).
        key: (batch, heads_kv, capacity, head_dim), or what a :class:`FlashCache` holds for the layer.
            Grouped heads stay grouped.
        value: as ``key``, with a head_dim of its own if need be.
        attention_mask: None, or what our mask function made.
        arguments: ``scaling``, ``is_causal``, ``sliding_window`` (keys visible, one's own among them),
            ``softcap`` and ``s_aux`` (sinks) are honoured, those of :data:`HARMLESS` are let pass.

    Returns:
        out, (batch, q_len, heads_q, head_dim_v) contiguous, and None in the place of the weights.

    Raises:
        Unsupported: an argument that is not None and not known; a tensor that requires grad; a window that
            the mask has and the layer does not pass on; packed sequences.
        InvalidInput: a mask that is not ours, or tensors that do not fit each other.
    """
    _refuse_unknown(arguments)
    queries = validate.queries(query.transpose(1, 2))
    is_causal = arguments.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    options = _options(queries, causal, arguments)
    if isinstance(key, CachedKeys):
        bounds = None if attention_mask is None else unpack(attention_mask, key.cache.capacity)
        cache = _cached(queries, key, value, bounds)
    else:
        bounds = None if attention_mask is None else unpack(attention_mask, key.shape[2])
        cache = _given(queries, key, value, bounds)
    if bounds is not None:
        _check_pattern(bounds, options)
    out, _ = ops.attention(queries, cache, options, return_lse=False)
    return out, None


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if value is None or name in HONOURED or name in HARMLESS:
            continue
        if name in {"dropout", "output_attentions"} and not value:
            continue
        why = _REFUSED.get(name, "it is not known what it would change")
        raise Unsupported(f"{name} in attention of Transformers", (why,))


def _options(queries: Queries, causal: bool, arguments: Mapping[str, Any]) -> Options:
    window, softcap = arguments.get("sliding_window"), arguments.get("softcap")
    if window is not None and not causal:
        raise Unsupported(
            "sliding_window without a causal mask", ("windows to both sides are not known here",)
        )
    return validate.options(
        queries,
        softmax_scale=arguments.get("scaling"),
        causal=causal,
        window_size=(UNBOUNDED if window is None else window - 1, UNBOUNDED),
        softcap=0.0 if softcap is None else softcap,
        sinks=arguments.get("s_aux"),
    )


def _check_pattern(bounds: Bounds, options: Options) -> None:
    """The model made the mask, the layer passed the arguments: both have to mean the same."""
    if bounds.packed:
        way_out = "pad them, or flash_decoding.flash_attn has them"
        why = "while a graph is captured, models without a cache and a (batch, tokens) mask ask for them, too"
        raise Unsupported("the mask of packed sequences", (way_out, why))
    if bounds.causal != (options.window_right == 0):
        kinds = ("causal", "bidirectional")
        mask, layer = kinds if bounds.causal else kinds[::-1]
        raise Unsupported(f"a {mask} mask for a layer whose is_causal says {layer}")
    if bounds.windowed and options.window_left == UNBOUNDED:
        why = "the model hides keys by its mask alone: its layers do not pass sliding_window to attention"
        raise Unsupported("a mask with a window for a layer without one", (why,))


def _given(queries: Queries, key: Tensor, value: Tensor | CachedKeys, bounds: Bounds | None) -> KVCache:
    if not isinstance(value, Tensor):
        raise InvalidInput("value", type(value).__name__, "a tensor, as key is")
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if bounds is None:
        return validate.dense_keys(queries, k, v)
    cache = validate.kv_cache(queries, k, v, cache_seqlens=bounds.lengths, cache_leftpad=bounds.starts)
    return validate.masked(cache, bounds.key_mask)


def _cached(queries: Queries, key: CachedKeys, value: Tensor | CachedKeys, bounds: Bounds | None) -> KVCache:
    cache = key.cache
    if not isinstance(value, CachedKeys) or value.cache is not cache:
        raise InvalidInput("value", type(value).__name__, "the handle that key is")
    validate.layout(
        queries.q,
        queries.batch,
        cache.k,
        cache.v,
        block_table=cache.block_table,
        cache_batch_idx=cache.cache_batch_idx,
    )
    validate.heads(queries.q, cache.heads)
    if bounds is None:
        return cache
    if cache.cache_leftpad is not None or cache.key_mask is not None:
        raise Unsupported("a mask of padding for a cache that knows which of its slots exist")
    if bounds.starts.shape[0] != queries.batch:
        raise InvalidInput("attention_mask", f"{bounds.starts.shape[0]} rows", f"{queries.batch}, the batch")
    padded = dataclasses.replace(cache, cache_leftpad=bounds.starts)
    return validate.masked(padded, bounds.key_mask)
