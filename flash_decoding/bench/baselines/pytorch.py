"""What PyTorch itself offers: primitives, and the backends of scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_decoding.bench.cases import Case, Inputs
from flash_decoding.bench.column import Call, Column, anywhere


def cuda_only(case: Case) -> str | None:
    """The ``why_not`` of a column that needs a GPU."""
    return None if case.device.type == "cuda" else "CUDA only"


def no_grouped_heads(case: Case) -> str | None:
    """The ``why_not`` of PyTorch's memory-efficient backend."""
    if case.device.type == "cuda" and case.group > 1:
        return "takes as many key/value heads as query heads, and expanding them would copy the cache"
    return cuda_only(case)


def _prepare_eager(case: Case, inputs: Inputs) -> Call:
    shape = (case.batch, case.heads_kv, case.group, case.kv_len, case.head_dim)

    def repeated(x: Tensor) -> Tensor:
        """Keys or values for every query head, (batch, heads_q, kv_len, head_dim), as models repeat them."""
        return x.transpose(1, 2).unsqueeze(2).expand(shape).flatten(1, 2)

    def call() -> Tensor:
        scores = (inputs.q * case.scale).transpose(1, 2) @ repeated(inputs.k).transpose(2, 3)
        return (torch.softmax(scores, dim=-1) @ repeated(inputs.v)).transpose(1, 2)

    return call


def _prepare_unsplit(case: Case, inputs: Inputs) -> Call:
    """FlashAttention-2 by its variable-length entry point, which splits only where it packs heads.

    Told that a sequence may have two queries (each has one), it neither packs the query heads of a KV head
    nor splits the keys: the FlashAttention that Flash-Decoding was announced against.
    """
    q = inputs.q.flatten(0, 1)
    k, v = inputs.k.flatten(0, 1), inputs.v.flatten(0, 1)
    ends_q = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device)
    ends_k = ends_q * case.kv_len
    max_q = 2

    def call() -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, ends_q, ends_k, max_q, case.kv_len, 0.0, False, False, scale=case.scale
        )[0]
        return out

    return call


def _sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Call]:
    def prepare(case: Case, inputs: Inputs) -> Call:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return call

    return prepare


EAGER = Column.simple(
    "eager", "PyTorch primitives: expand K and V heads, matmul, softmax, matmul", _prepare_eager
)
UNSPLIT = Column.simple(
    "FA2, no split",
    "PyTorch's FlashAttention-2 through its variable-length entry point: one program per query head",
    _prepare_unsplit,
    why_not=cuda_only,
)
SDPA = tuple(
    Column.simple(
        name, f"scaled_dot_product_attention(enable_gqa=True), {about}", _sdpa(backend), why_not=why
    )
    for name, backend, about, why in (
        (
            "SDPA flash",
            SDPBackend.FLASH_ATTENTION,
            "flash backend (CUDA: FlashAttention-2, splits)",
            anywhere,
        ),
        ("SDPA mem-eff", SDPBackend.EFFICIENT_ATTENTION, "memory-efficient backend", no_grouped_heads),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, "cuDNN backend", cuda_only),
        ("SDPA math", SDPBackend.MATH, "math backend", anywhere),
    )
)
