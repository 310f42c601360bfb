"""Continuous batching: Transformers schedules requests and owns the pages, attention over them is ours.

``model.generate_batch`` and the managers behind it call a model's attention with a batch among the arguments.
With it comes their cache, or what the layer has got from it (:mod:`flash_decoding.transformers.pages`). Up to
Transformers 5.18 they put ``paged|`` before its name and call what is registered under that. A batch comes in
one of two shapes, both as one row of tokens:

- prompts, or prompts among tokens being decoded: Transformers' cache writes the new keys and gathers the old
  ones, and attention goes over packed keys;
- one token of each request (the "decode fast path"): keys are written to their pages and read where they
  lie, through a block table.

Batches of fixed size, as CUDA graphs need them, are filled up with requests of length 0. Their entries of the
block table are -1, so nothing may be written for them, and nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.generation.continuous_batching import initialization
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flash_decoding.api import append_kv
from flash_decoding.errors import Unsupported
from flash_decoding.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from flash_decoding.spec import UNBOUNDED
from flash_decoding.transformers.attention import HARMLESS, HONOURED
from flash_decoding.transformers.bounds import is_ours, unpack
from flash_decoding.transformers.hooks import teach
from flash_decoding.transformers.pages import Share, share_of

HAS_PREFIX = "paged|sdpa" in ALL_ATTENTION_FUNCTIONS
"""Whether continuous batching calls attention by names of its own: Transformers' functions then have them."""

NAME = "paged|flash_decoding" if HAS_PREFIX else "flash_decoding"
"""Our name while a model is run by continuous batching."""

_BATCH = frozenset(
    {
        *("cache", "block_table", "read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k"),
        *("max_seqlen_q", "max_seqlen_k"),  # up to 5.18
        *("max_length_q", "max_length_k"),
        *("k_cache", "v_cache"),  # since 5.24, in the place of the cache
    }
)
"""What the engine says of a batch."""

_ENGINE = frozenset({"logits_indices", "logits_processor_args", "dropout"})
"""What passes by: for the sampler; and dropout, which :func:`attention` checks by its value."""


def is_batch(arguments: Mapping[str, Any]) -> bool:
    """Whether there is a batch of continuous batching among the arguments of attention, in any release.

    Args:
        arguments: all that a layer passes by name.
    """
    return arguments.get("write_index") is not None


def install() -> None:
    """Register attention for continuous batching; calling it again does nothing."""
    if HAS_PREFIX:  # else the function of the plain name hands over to ours
        AttentionInterface.register(NAME, attention)
    _open_fast_path()


def _open_fast_path() -> None:
    """Let requests be decoded through a block table where attention is ours.

    Transformers asks for a name with "flash" and "2" or "3" in it, for CUDA, and then for the package of that
    name; without them it leaves the fast path. Ours needs none of the three. For all other names its check
    is what it was.
    """

    def made(check: Callable[..., None]) -> Callable[..., None]:
        def checked(config: Any, *rest: Any, **named: Any) -> None:
            if config._attn_implementation != NAME:
                check(config, *rest, **named)

        return checked

    teach(initialization, "ensure_decode_fast_path_is_available", made)


@dataclass(frozen=True, eq=False)
class _Batch:
    """A batch as one layer sees it."""

    share: Share
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, layer: nn.Module, arguments: Mapping[str, Any]) -> _Batch:
        share = share_of(layer, arguments)
        longest_q, longest_k = (
            arguments[name] if name in arguments else arguments[name.replace("seqlen", "length")]
            for name in ("max_seqlen_q", "max_seqlen_k")
        )
        lengths, longest_k = share.own(arguments["cu_seq_lens_k"]), share.own(longest_k)
        return cls(share, arguments["cu_seq_lens_q"], lengths, longest_q, longest_k, arguments)


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
        key: (1, heads_kv, tokens, head_dim); from 5.24 on with the old ones, unless there is a block table.
        value: (1, heads_kv, tokens, head_dim_v), as ``key``.
        attention_mask: None, or what our mask function made of packed sequences or a window: lengths say all.
        arguments: the batch (``cache``, ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``,
            ``max_length_k``, ``read_index``, ``write_index``, ``block_table``; from 5.24 on ``k_cache`` and
            ``v_cache`` in the place of ``cache``), and of the layer ``scaling``, ``sliding_window`` (keys
            visible, one's own among them), ``softcap``, ``s_aux`` (sinks).

    Returns:
        out, (tokens, heads_q, head_dim_v), and None in the place of the weights. Tokens behind the last
        request have nothing to attend to, and their rows nothing to say.

    Raises:
        Unsupported: a forward outside of continuous batching, or an argument that is not None and not known.
        InvalidInput: tensors that do not fit each other.
    """
    _refuse(module, attention_mask, arguments)
    batch, head_dim, head_dim_v = _Batch.of(module, arguments), key.shape[-1], value.shape[-1]
    scores = _scores(batch, arguments)
    if head_dim_v != head_dim:  # the cache is as wide for values as for keys
        value = nn.functional.pad(value, (0, head_dim - head_dim_v))
    attend = _decode if arguments.get("block_table") is not None else _packed
    return attend(batch, query, key, value, scores)[..., :head_dim_v], None


def _refuse(layer: Any, attention_mask: Tensor | None, arguments: Mapping[str, Any]) -> None:
    what = f'attention "{NAME}"'
    if not is_batch(arguments):
        why = 'it is for generate_batch alone: set "flash_decoding" and let generate_batch add the rest'
        raise Unsupported(f"{what} without a paged cache", (why,))
    _refuse_mask(what, attention_mask, arguments.get("sliding_window"))
    is_causal = arguments.get("is_causal")
    if not (getattr(layer, "is_causal", True) if is_causal is None else is_causal):
        raise Unsupported(f"{what} of a layer that is not causal", ("requests are decoded token by token",))
    if arguments.get("dropout"):
        raise Unsupported(f"dropout in {what}", ("forward only: call model.eval()",))
    known = _BATCH | HONOURED | _ENGINE | HARMLESS.keys()
    for name in sorted(arguments.keys() - known):
        if arguments[name] is not None:
            raise Unsupported(f"{name} in {what}", ("it is not known what it would change",))


def _refuse_mask(what: str, mask: Tensor | None, window: int | None) -> None:
    """Models ask for a mask even where lengths say all: it may repeat them, and add nothing."""
    if mask is None:
        return
    bounds = unpack(mask, 0) if is_ours(mask) else None
    if bounds is None or bounds.key_mask is not None or not (bounds.packed or bounds.windowed):
        raise Unsupported(f"an attention mask for {what}", ("lengths say which keys there are",))
    if bounds.windowed and window is None:
        why = "the model hides keys by its mask alone: its layers do not pass sliding_window to attention"
        raise Unsupported(f"a mask with a window for {what} of a layer without one", (why,))


def _scores(batch: _Batch, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What both functions are to do with scores and mask, in their words."""
    window, cached = arguments.get("sliding_window"), batch.share.window
    if cached not in (None, window):
        why = f"the cache keeps the last {cached} keys, the layer asks for a window of {window}"
        raise Unsupported(f"the window of layer {batch.share.layer}", (why,))
    return {
        "softmax_scale": arguments.get("scaling"),
        "causal": True,
        "window_size": (UNBOUNDED if window is None else window - 1, UNBOUNDED),
        "softcap": arguments.get("softcap") or 0.0,
        "sinks": arguments.get("s_aux"),
    }


def _packed(batch: _Batch, query: Tensor, key: Tensor, value: Tensor, scores: dict[str, Any]) -> Tensor:
    """Attention over keys that the cache gathers, (tokens, heads_q, head_dim)."""
    k, v = batch.share.update(key, value, batch.arguments)
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
    k_cache, v_cache = batch.share.pools(batch.arguments)
    table = batch.share.table(batch.arguments)
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    lengths = batch.cu_seqlens_k.diff()  # the new token included
    # The slot of the new token. Where the length is 0, -1 becomes a slot beyond any capacity, whose token is
    # dropped: page -1 would be kept inside the pool, and be the page of somebody else.
    slots = (lengths - 1).bitwise_and_(torch.iinfo(torch.int32).max)
    append_kv(k, v, k_cache, v_cache, cache_seqlens=slots, block_table=table)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, **scores)
    assert isinstance(out, Tensor)
    return out.squeeze(1)
