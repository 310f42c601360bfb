"""Continuous batching: Transformers schedules requests and owns the pages, attention over them is ours.

``model.generate_batch`` and the managers behind it put ``paged|`` before the name of a model's attention and
call what is registered under that. A batch comes in one of two shapes, both as one row of tokens:

- prompts, or prompts among tokens being decoded: Transformers' cache writes the new keys and gathers the old
  ones, and attention goes over packed keys;
- one token of each request (the "decode fast path"): keys are written to their pages and read where they
  lie, through a block table.

Batches of fixed size, as CUDA graphs need them, are filled up with requests of length 0. Their entries of the
block table are -1, so nothing may be written for them, and nothing is read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.generation.continuous_batching import PagedAttentionCache, initialization

from flash_decoding.api import append_kv
from flash_decoding.errors import Unsupported
from flash_decoding.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_decoding.spec import UNBOUNDED
from flash_decoding.transformers.attention import HARMLESS

NAME = "paged|flash_decoding"

_BATCH = frozenset(
    {
        *("cache", "block_table", "read_index", "write_index"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_seqlen_q", "max_seqlen_k"),
    }
)
"""What the engine says of a batch."""

_SCORES = frozenset({"scaling", "softcap", "s_aux", "sliding_window", "is_causal"})
"""What the layer asks of attention."""

_ENGINE = frozenset({"logits_indices", "logits_processor_args", "dropout"})
"""What passes by: for the sampler; and dropout, which :func:`attention` checks by its value."""

_NO_WINDOW = 1
"""How Transformers' paged cache writes that a layer has none."""


def install() -> None:
    """Register attention for continuous batching; calling it again does nothing."""
    AttentionInterface.register(NAME, attention)
    _open_fast_path()


def _open_fast_path() -> None:
    """Let requests be decoded through a block table where attention is ours.

    Transformers asks for a name with "flash" and "2" or "3" in it, for CUDA, and then for the package of that
    name; without them it leaves the fast path. Ours needs none of the three. For all other names its check
    is what it was.
    """
    check = initialization.ensure_decode_fast_path_is_available
    if hasattr(check, "knows_flash_decoding"):
        return

    @functools.wraps(check)
    def checked(config: Any, *rest: Any, **named: Any) -> None:
        if config._attn_implementation != NAME:
            check(config, *rest, **named)

    checked.knows_flash_decoding = True  # type: ignore[attr-defined]  # a mark on a function of our own
    initialization.ensure_decode_fast_path_is_available = checked


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch as one layer sees it."""

    cache: PagedAttentionCache
    layer: int
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, layer: int, arguments: Mapping[str, Any]) -> _Batch:
        """Models with two kinds of layers have two sets of lengths, by the kind."""
        cache = arguments["cache"]
        kind = "full_attention" if cache.sliding_windows[layer] == _NO_WINDOW else "sliding_attention"
        lengths, longest = (
            value[kind] if isinstance(value, dict) else value
            for value in (arguments["cu_seq_lens_k"], arguments["max_seqlen_k"])
        )
        cu_seqlens_q, max_seqlen_q = arguments["cu_seq_lens_q"], arguments["max_seqlen_q"]
        return cls(cache, layer, cu_seqlens_q, lengths, max_seqlen_q, longest, arguments)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer over a batch of requests, whose new keys and values it also puts into the cache.

    Args:
        module: the layer; ``layer_idx`` is its place in the cache.
        query: (1, heads_q, tokens, head_dim), the tokens of all requests one after the other.
        key: (1, heads_kv, tokens, head_dim).
        value: (1, heads_kv, tokens, head_dim_v).
        attention_mask: None: lengths say all.
        arguments: the batch (``cache``, ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_seqlen_q``,
            ``max_seqlen_k``, ``read_index``, ``write_index``, ``block_table``), and of the layer ``scaling``,
            ``sliding_window`` (keys visible, one's own among them), ``softcap``, ``s_aux`` (sinks).

    Returns:
        out, (tokens, heads_q, head_dim_v), and None in the place of the weights. Tokens behind the last
        request have nothing to attend to, and their rows nothing to say.

    Raises:
        Unsupported: a forward outside of continuous batching, or an argument that is not None and not known.
        InvalidInput: tensors that do not fit each other.
    """
    layer: Any = module
    _refuse(layer, attention_mask, arguments)
    batch, head_dim_v = _Batch.of(layer.layer_idx, arguments), value.shape[-1]
    scores = _scores(batch, arguments)
    if head_dim_v != batch.cache.head_dim:  # its storage is as wide for values as for keys
        value = nn.functional.pad(value, (0, batch.cache.head_dim - head_dim_v))
    attend = _decode if arguments.get("block_table") is not None else _packed
    return attend(batch, query, key, value, scores)[..., :head_dim_v], None


def _refuse(layer: Any, attention_mask: Tensor | None, arguments: Mapping[str, Any]) -> None:
    what = f'attention "{NAME}"'
    if arguments.get("cache") is None:
        why = 'it is for generate_batch alone: set "flash_decoding" and let generate_batch add the rest'
        raise Unsupported(f"{what} without a paged cache", (why,))
    if attention_mask is not None:
        raise Unsupported(f"an attention mask for {what}", ("lengths say which keys there are",))
    is_causal = arguments.get("is_causal")
    if not (getattr(layer, "is_causal", True) if is_causal is None else is_causal):
        raise Unsupported(f"{what} of a layer that is not causal", ("requests are decoded token by token",))
    if arguments.get("dropout"):
        raise Unsupported(f"dropout in {what}", ("forward only: call model.eval()",))
    known = _BATCH | _SCORES | _ENGINE | HARMLESS.keys()
    for name in sorted(arguments.keys() - known):
        if arguments[name] is not None:
            raise Unsupported(f"{name} in {what}", ("it is not known what it would change",))


def _scores(batch: _Batch, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What both functions are to do with scores and mask, in their words."""
    window, cached = arguments.get("sliding_window"), batch.cache.sliding_windows[batch.layer]
    if cached not in (_NO_WINDOW, window):
        why = f"the cache keeps the last {cached} keys, the layer asks for a window of {window}"
        raise Unsupported(f"the window of layer {batch.layer}", (why,))
    return {
        "softmax_scale": arguments.get("scaling"),
        "causal": True,
        "window_size": (UNBOUNDED if window is None else window - 1, UNBOUNDED),
        "softcap": arguments.get("softcap") or 0.0,
        "sinks": arguments.get("s_aux"),
    }


def _packed(batch: _Batch, query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any]) -> Tensor:
    """Attention over keys that the cache gathers, (tokens, heads_q, head_dim)."""
    indices = {name: batch.arguments[name] for name in ("read_index", "write_index")}
    k, v = batch.cache.update(key_states=key, value_states=value, layer_idx=batch.layer, **indices)
    out = flash_attn_varlen_func(
        query[0].transpose(0, 1),
        k,
        v,
        batch.cu_seqlens_q,
        batch.cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        **scores,
    )
    assert isinstance(out, Tensor)
    return out


def _decode(batch: _Batch, query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any]) -> Tensor:
    """Attention of one token each over the pages of its request, (requests, heads_q, head_dim)."""
    cache = batch.cache
    group, place = cache.layer_index_to_group_indices[batch.layer]
    k_cache, v_cache = (
        pool[place].view(-1, cache.block_size, *pool[place].shape[1:])
        for pool in (cache.key_cache, cache.value_cache)
    )
    table = batch.arguments["block_table"][group]
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    lengths = batch.cu_seqlens_k.diff()  # the new token included
    # The slot of the new token. Where the length is 0, -1 becomes a slot beyond any capacity, whose token is
    # dropped: page -1 would be kept inside the pool, and be the page of somebody else.
    slots = (lengths - 1).bitwise_and_(torch.iinfo(torch.int32).max)
    append_kv(k, v, k_cache, v_cache, cache_seqlens=slots, block_table=table)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, **scores)
    assert isinstance(out, Tensor)
    return out.squeeze(1)
