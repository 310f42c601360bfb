"""A forward of new tokens, in two ways: the model's own layers, or their blocks on our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from flash_decoding import ops
from flash_decoding.decoder import linear
from flash_decoding.decoder.blocks import Block, Blocks
from flash_decoding.spec import KVCache, NewTokens, Options, Queries
from flash_decoding.transformers.cache import FlashCache
from flash_decoding.transformers.names import cache_argument

Attention = Callable[[Queries, KVCache, Options], Tensor]
"""(batch, q_len, heads_q, head_dim_v) from queries, cache and options."""


def library_attention(queries: Queries, cache: KVCache, options: Options) -> Tensor:
    """The library's own."""
    return ops.attention(queries, cache, options, return_lse=False)[0]


def by_model(model: PreTrainedModel, cache: FlashCache, tokens: Tensor, *, keep: Tensor | int = 0) -> Tensor:
    """Logits by the model's own forward, inside of a step of its cache.

    Args:
        model: any causal language model that runs with our attention.
        cache: with a step open.
        tokens: (rows, q_len).
        keep: columns to compute logits for: indices, or so many of the last; 0 for all.

    Returns:
        (rows, columns kept, vocabulary).
    """
    result = model(
        input_ids=tokens,
        position_ids=cache.positions(tokens.shape[1]),
        use_cache=True,
        logits_to_keep=keep,
        **{cache_argument(type(model).forward): cache},
    )
    logits: Tensor = result.logits
    return logits


def by_blocks(blocks: Blocks, cache: FlashCache, tokens: Tensor, attend: Attention) -> Tensor:
    """Logits by the blocks, inside of a step of the cache.

    Args:
        blocks: of the model.
        cache: with a step open.
        tokens: (rows, q_len).
        attend: what computes attention.

    Returns:
        (rows, q_len, vocabulary).
    """
    x = functional.embedding(tokens.flatten(), blocks.embedding)
    for block, view in zip(blocks.layers, cache.begin(), strict=True):
        x = _block(x, block, blocks, view, attend)
    return linear.apply(blocks.head, x).view(*tokens.shape, -1)


def _block(x: Tensor, block: Block, blocks: Blocks, cache: KVCache, attend: Attention) -> Tensor:
    """One layer: x (tokens, hidden) to the same."""
    batch, head_dim = cache.cache_seqlens.shape[0], blocks.head_dim
    heads = [blocks.heads_q, blocks.heads_kv, blocks.heads_kv]
    qkv = linear.apply(block.qkv, x).view(batch, -1, sum(heads), head_dim)
    q, k, v = torch.split(qkv, heads, dim=2)
    if block.q_norm is not None and block.k_norm is not None:
        q, k = linear.normalised(q, block.q_norm), linear.normalised(k, block.k_norm)
    rotated = torch.empty_like(q, memory_format=torch.contiguous_format)
    ops.append_kv(NewTokens(k, v, blocks.rotary, q, rotated), cache)
    out = attend(Queries(rotated), cache, block.options)
    x = linear.apply(block.out, out.view(x.shape[0], -1), x)
    return linear.apply(block.down, linear.apply(block.gate_up, x), x)
