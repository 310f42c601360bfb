"""Other attention libraries, each timed only where it is installed.

One function per library, called the way its own documentation shows for decoding over a contiguous cache;
plans, biases, page tables and changed cache layouts are made outside the timed call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from flash_decoding.bench.baselines.pytorch import cuda_only
from flash_decoding.bench.cases import Case, Inputs
from flash_decoding.bench.column import Call, Column

PAGE = 16
"""Tokens per page where a library knows only paged caches."""

VLLM_PARTITION = 512
"""Tokens per partition of vLLM's paged_attention_v2, a constant of its kernel."""


def needs(package: str, *, multiple_of: int = 1) -> Callable[[Case], str | None]:
    """The ``why_not`` of a column that needs a package, a GPU, and lengths in whole pages."""

    def why_not(case: Case) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if case.kv_len % multiple_of:
            return f"length {case.kv_len} is not a multiple of {multiple_of}"
        return cuda_only(case)

    return why_not


def _prepare_flash_attn(case: Case, inputs: Inputs) -> Call:
    from flash_attn import flash_attn_with_kvcache

    return _kvcache_call(flash_attn_with_kvcache, inputs)


def _prepare_flash_attn_3(case: Case, inputs: Inputs) -> Call:
    from flash_attn_interface import (  # type: ignore[import-not-found]  # it ships no types
        flash_attn_with_kvcache,
    )

    return _kvcache_call(flash_attn_with_kvcache, inputs)


def _kvcache_call(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    def call() -> Tensor:
        return function(inputs.q, inputs.k, inputs.v, cache_seqlens=inputs.cache_seqlens, causal=True)

    return call


def _prepare_flashinfer_single(case: Case, inputs: Inputs) -> Call:
    from flashinfer import single_decode_with_kv_cache

    q, k, v = inputs.q[0, 0], inputs.k[0], inputs.v[0]

    def call() -> Tensor:
        out: Tensor = single_decode_with_kv_cache(q, k, v, kv_layout="NHD", use_tensor_cores=True)
        return out

    return call


def _prepare_flashinfer(case: Case, inputs: Inputs) -> Call:
    """The paged wrapper over the same memory, seen as pages in order; batch 1 has its own entry point."""
    if case.batch == 1:
        return _prepare_flashinfer_single(case, inputs)
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, k, v = inputs.q.squeeze(1), as_pages(inputs.k), as_pages(inputs.v)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=case.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=case.device) * (case.kv_len // PAGE)
    indices = torch.arange(k.shape[0], dtype=torch.int32, device=case.device)
    last_page_len = torch.full((case.batch,), PAGE, dtype=torch.int32, device=case.device)
    wrapper.plan(
        indptr,
        indices,
        last_page_len,
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        PAGE,
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )

    def call() -> Tensor:
        out: Tensor = wrapper.run(q, (k, v))
        return out

    return call


def _prepare_xformers(case: Case, inputs: Inputs) -> Call:
    """Padded keys of every sequence in one row, heads as (heads_kv, group) with the group expanded."""
    from xformers.ops import fmha

    q = inputs.q.reshape(1, case.batch * case.q_len, case.heads_kv, case.group, case.head_dim)
    k, v = (
        x.flatten(0, 1)[None, :, :, None, :].expand(-1, -1, -1, case.group, -1) for x in (inputs.k, inputs.v)
    )
    bias = fmha.attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[case.q_len] * case.batch,
        kv_padding=case.kv_len,
        kv_seqlen=[case.kv_len] * case.batch,
        device=case.device,
    )

    def call() -> Tensor:
        out: Tensor = fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias)
        return out

    return call


def _prepare_vllm(case: Case, inputs: Inputs) -> Call:
    """paged_attention_v2, whose keys lie as (pages, heads_kv, head_dim / x, PAGE, x), 16 bytes in x."""
    from vllm import _custom_ops

    x = 16 // case.dtype.itemsize
    k = (
        as_pages(inputs.k)
        .view(-1, PAGE, case.heads_kv, case.head_dim // x, x)
        .permute(0, 2, 3, 1, 4)
        .contiguous()
    )
    v = as_pages(inputs.v).permute(0, 2, 3, 1).contiguous()
    q = inputs.q.squeeze(1)
    pages = torch.arange(k.shape[0], dtype=torch.int32, device=case.device).view(case.batch, -1)
    partitions = -(-case.kv_len // VLLM_PARTITION)
    sums, maxima = (
        torch.empty(case.batch, case.heads_q, partitions, dtype=torch.float32, device=case.device)
        for _ in range(2)
    )
    partial = q.new_empty(case.batch, case.heads_q, partitions, case.head_dim)
    one = torch.ones((), dtype=torch.float32, device=case.device)
    lengths, numbers = inputs.cache_seqlens, (PAGE, case.kv_len, None, "auto", one, one)

    def call() -> Tensor:
        out = torch.empty_like(q)
        scratch = (out, sums, maxima, partial)
        _custom_ops.paged_attention_v2(*scratch, q, k, v, case.heads_kv, case.scale, pages, lengths, *numbers)
        return out

    return call


def as_pages(x: Tensor) -> Tensor:
    """A contiguous cache as pages of :data:`PAGE` tokens in order, without a copy."""
    return x.view(-1, PAGE, *x.shape[2:])


PEERS = (
    Column.simple(
        "flash-attn",
        "flash_attn.flash_attn_with_kvcache (FlashAttention-2, its own splits)",
        _prepare_flash_attn,
        why_not=needs("flash_attn"),
    ),
    Column.simple(
        "flash-attn 3",
        "flash_attn_interface.flash_attn_with_kvcache (FlashAttention-3, its own splits)",
        _prepare_flash_attn_3,
        why_not=needs("flash_attn_interface"),
    ),
    Column.simple(
        "FlashInfer",
        f"single decode at batch 1, else the paged wrapper (pages of {PAGE}), planned outside the timing",
        _prepare_flashinfer,
        why_not=needs("flashinfer", multiple_of=PAGE),
    ),
    Column.simple(
        "xFormers",
        "memory_efficient_attention_forward, padded keys, grouped heads expanded without a copy",
        _prepare_xformers,
        why_not=needs("xformers"),
    ),
    Column.simple(
        "vLLM",
        f"paged_attention_v2 (pages of {PAGE}), cache laid out for it outside the timing",
        _prepare_vllm,
        why_not=needs("vllm", multiple_of=PAGE),
    ),
)
