"""Our Decoder: with its own attention, and with others' in its place and everything else equal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_decoding.bench.models.case import ModelCase
from flash_decoding.bench.models.column import ModelColumn, Prepare
from flash_decoding.errors import Unsupported
from flash_decoding.plan.hardware import Hardware
from flash_decoding.spec import KVCache, Options, Queries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Attention = Callable[[Queries, KVCache, Options], Tensor]


class DecoderStepper:
    """A Decoder whose cache is filled."""

    def __init__(self, model: PreTrainedModel, case: ModelCase, attention: Attention | None = None) -> None:
        from flash_decoding.decoder.decoder import Decoder

        self._decoder = Decoder(model, batch=case.batch, capacity=case.context, attention=attention)
        self._filled = case.filled
        storage = self._decoder.cache.storage
        storage.allocate(case.filled)
        storage.advance(torch.tensor(case.filled, dtype=torch.int32, device=case.device))
        for layer in range(case.layers):
            k, v = case.keys_and_values(layer)
            storage.keys[layer, :, : k.shape[1]] = k
            storage.values[layer, :, : v.shape[1]] = v

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each sequence; logits for the next."""
        return self._decoder.step(tokens)

    def rewind(self) -> None:
        """Forget the steps made."""
        self._decoder.truncate(self._filled)

    def close(self) -> None:
        """Nothing outside of this object."""


def plain_only(attend: Attention, what: str) -> Attention:
    """The same attention, refusing what it would get wrong."""

    def checked(queries: Queries, cache: KVCache, options: Options) -> Tensor:
        reasons = (
            (queries.q_len != 1 or queries.is_ragged, "it takes one token per sequence"),
            (cache.block_table is not None, "it takes no pages"),
            (cache.cache_batch_idx is not None, "it takes the rows of the cache in order"),
            (cache.cache_leftpad is not None or cache.key_mask is not None, "it knows no padding"),
            (not options.is_plain, "it knows no window, softcap, slopes or sinks"),
        )
        told = tuple(reason for applies, reason in reasons if applies)
        if told:
            raise Unsupported(what, told)
        return attend(queries, cache, options)

    return checked


def unsplit_flash(queries: Queries, cache: KVCache, options: Options) -> Tensor:
    """FlashAttention-2 by its variable-length entry point, which neither splits nor packs query heads.

    It is told that a sequence may have two queries, as in the attention suite; each row of the cache is a
    sequence, of which it uses the live keys.
    """
    batch, capacity = queries.batch, cache.capacity
    rows = torch.arange(batch + 1, dtype=torch.int32, device=queries.q.device)
    q, k, v = (x.flatten(0, 1) for x in (queries.q, cache.k, cache.v))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        rows,
        rows * capacity,
        2,
        capacity,
        0.0,
        False,
        False,
        scale=options.softmax_scale,
        seqused_k=cache.cache_seqlens + cache.new_tokens,
    )[0]
    return out.view(queries.q.shape)


def one_block(queries: Queries, cache: KVCache, options: Options) -> Tensor:
    """Our stand-in for FasterTransformer's kernel."""
    from flash_decoding.bench.baselines import one_block as kernel

    return kernel.attend(queries, cache, options)


def _with(attention: Attention, what: str) -> Prepare:
    checked = plain_only(attention, what)

    def prepare(model: PreTrainedModel, case: ModelCase) -> DecoderStepper:
        return DecoderStepper(model, case, checked)

    return prepare


def _prepare_vllm(model: PreTrainedModel, case: ModelCase) -> DecoderStepper:
    from flash_decoding.bench.baselines.vllm_block import VllmBlock

    return DecoderStepper(model, case, plain_only(VllmBlock(), "vLLM's paged_attention_v1"))


def _fits_vllm(case: ModelCase) -> str | None:
    """Its scores of a sequence, fp32, lie in the shared memory of one block, and its cache in whole pages."""
    if case.device.type != "cuda":
        return "CUDA only"
    if case.context % 16:
        return f"context {case.context} is not in whole pages of 16"
    room = Hardware.of(case.device).smem_bytes
    if 4 * case.context > room:
        return f"keeps the scores of a sequence in {room} bytes of shared memory: {room // 4} tokens at most"
    return None


def _cuda_only(case: ModelCase) -> str | None:
    return None if case.device.type == "cuda" else "CUDA only"


def _half_precision_only(case: ModelCase) -> str | None:
    if case.device.type == "cuda" and case.dtype == torch.float32:
        return "takes float16 and bfloat16"
    return _cuda_only(case)


def _needs_triton(case: ModelCase) -> str | None:
    if case.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _cuda_only(case)


UNSPLIT = ModelColumn(
    "FlashAttention unsplit",
    "our Decoder with PyTorch's FlashAttention-2 in place of our attention, one program per query head",
    "peer",
    _with(unsplit_flash, "FlashAttention-2 without a split"),
    why_not=_half_precision_only,
)
ONE_BLOCK_STAND_IN = ModelColumn(
    "one block per head (FasterTransformer's scheme)",
    "our Decoder with a stand-in of ours for FasterTransformer's kernel: a block per sequence and query head",
    "peer",
    _with(one_block, "attention in one block per head"),
    why_not=_needs_triton,
)
ONE_BLOCK_VLLM = ModelColumn(
    "one block per head (vLLM)",
    "our Decoder with vLLM's paged_attention_v1, heir of FasterTransformer's kernel, on a copy in its layout",
    "peer",
    _prepare_vllm,
    why_not=_fits_vllm,
)
OURS = ModelColumn(
    "ours", "flash_decoding.decoder.Decoder as it is, lengths on the device", "ours", DecoderStepper
)
