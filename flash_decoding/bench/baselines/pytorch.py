"""What PyTorch itself offers: primitives, and the backends of scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from flash_decoding.bench.baselines.able import cuda_only, dense_only, first_of, no_pages, one_token
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column, anywhere
from flash_decoding.bench.inputs import Inputs


def no_grouped_heads(case: Case) -> str | None:
    """The ``why_not`` of PyTorch's memory-efficient backend."""
    if case.device.type == "cuda" and case.group > 1:
        return "takes as many key/value heads as query heads, and expanding them would copy the cache"
    return cuda_only(case)


def no_window_of_flash(case: Case) -> str | None:
    """The ``why_not`` of PyTorch's flash backend: a GPU's takes no mask but the causal one."""
    is_masked = case.window and case.q_len > 1 and case.device.type == "cuda"
    return "takes no window for several query tokens" if is_masked else None


def _mask(case: Case) -> Tensor | None:
    """(q_len, slots) bool where query tokens differ in what they see."""
    return case.sees(*case.visible[0]) if case.q_len > 1 else None


def _prepare_eager(case: Case, inputs: Inputs) -> Call:
    k, v = inputs.dense(case)
    shape = (case.batch, case.heads_kv, case.group, k.shape[1], case.head_dim)
    mask = _mask(case)
    hidden = None if mask is None else ~mask

    def repeated(x: Tensor) -> Tensor:
        """Keys or values for every query head, (batch, heads_q, slots, head_dim), as models repeat them."""
        return x.transpose(1, 2).unsqueeze(2).expand(shape).flatten(1, 2)

    def call() -> Tensor:
        scores = (inputs.q * case.scale).transpose(1, 2) @ repeated(k).transpose(2, 3)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        return (torch.softmax(scores, dim=-1) @ repeated(v)).transpose(1, 2)

    return call


def _prepare_unsplit(case: Case, inputs: Inputs) -> Call:
    """FlashAttention-2 by its variable-length entry point, which splits only where it packs heads.

    Told that a sequence may have two queries where each has one, it neither packs the query heads of a KV
    head nor splits the keys: the FlashAttention that Flash-Decoding was announced against.
    """
    q, k, v = (x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    rows = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    ends_q, ends_k, max_q = rows * case.q_len, rows * case.kv_len, max(2, case.q_len)
    left, right = case.window_size if case.window else (None, None)
    is_causal = case.q_len > 1

    def call() -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            ends_q,
            ends_k,
            max_q,
            case.kv_len,
            0.0,
            is_causal,
            False,
            scale=case.scale,
            window_size_left=left,
            window_size_right=right,
            seqused_k=inputs.cache_seqlens if case.lengths else None,
        )[0]
        return out

    return call


def _prepare_sdpa_by_itself(case: Case, inputs: Inputs) -> Call:
    """With no backend asked for, as a model calls it; full caches and one query token."""
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, *inputs.dense(case)))
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=case.group > 1).transpose(1, 2)


def _sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, *inputs.dense(case)))
        mask = _mask(case)
        if mask is not None and backend == SDPBackend.FLASH_ATTENTION and case.device.type == "cuda":
            mask = causal_lower_right(case.q_len, k.shape[2])

        def call() -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2)

        return call

    return prepare


EAGER = Column.simple(
    "eager",
    "PyTorch primitives: expand K and V heads, matmul, softmax, matmul",
    _prepare_eager,
    why_not=dense_only,
)
UNSPLIT = Column.simple(
    "FA2, no split",
    "PyTorch's FlashAttention-2 through its variable-length entry point: one program per query head",
    _prepare_unsplit,
    why_not=first_of(no_pages, cuda_only),
)
SDPA_BY_ITSELF = Column.simple(
    "SDPA",
    "scaled_dot_product_attention, its own choice of backend",
    _prepare_sdpa_by_itself,
    why_not=first_of(dense_only, one_token),
)
SDPA = tuple(
    Column.simple(
        name,
        f"scaled_dot_product_attention(enable_gqa=True), {about}",
        _sdpa(backend),
        why_not=first_of(dense_only, why),
    )
    for name, backend, about, why in (
        (
            "SDPA flash",
            SDPBackend.FLASH_ATTENTION,
            "flash backend (CUDA: FlashAttention-2, splits)",
            no_window_of_flash,
        ),
        ("SDPA mem-eff", SDPBackend.EFFICIENT_ATTENTION, "memory-efficient backend", no_grouped_heads),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, "cuDNN backend", cuda_only),
        ("SDPA math", SDPBackend.MATH, "math backend", anywhere),
    )
)
