"""Other attention libraries, each timed only where it is installed.

Each is called the way its own documentation shows for decoding over a KV cache; plans, biases, page tables
and changed cache layouts are made outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_decoding.bench.baselines import flash_infer, xformers_splitk
from flash_decoding.bench.baselines.able import (
    cuda_only,
    first_of,
    half_precision,
    installed,
    no_window,
    one_token,
    pages_in,
    whole_pages,
)
from flash_decoding.bench.baselines.pages import PAGE, Pages
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column
from flash_decoding.bench.inputs import Inputs

VLLM_PARTITION = 512
"""Tokens per partition of vLLM's paged_attention_v2, a constant of its kernel."""

FLASH_ATTN_PAGE = 256
"""What flash-attn 2 wants pages to be a multiple of."""

VLLM_PAGES = (8, 16, 32)
"""Page sizes that vLLM's kernel is built for."""


def pages_for_flash_attn(case: Case) -> str | None:
    """The ``why_not`` of flash-attn 2, of pages alone."""
    is_odd = case.page_size % FLASH_ATTN_PAGE != 0
    return f"takes pages in multiples of {FLASH_ATTN_PAGE}, not {case.page_size}" if is_odd else None


def _prepare_flash_attn(case: Case, inputs: Inputs) -> Call:
    from flash_attn import flash_attn_with_kvcache

    return _kvcache_call(flash_attn_with_kvcache, "block_table", case, inputs)


def _prepare_flash_attn_3(case: Case, inputs: Inputs) -> Call:
    from flash_attn_interface import (  # type: ignore[import-not-found]  # it ships no types
        flash_attn_with_kvcache,
    )

    return _kvcache_call(flash_attn_with_kvcache, "page_table", case, inputs)


def _kvcache_call(function: Callable[..., Tensor], table_name: str, case: Case, inputs: Inputs) -> Call:
    pages = {} if inputs.block_table is None else {table_name: inputs.block_table}

    def call() -> Tensor:
        return function(
            inputs.q,
            inputs.k,
            inputs.v,
            cache_seqlens=inputs.cache_seqlens,
            causal=True,
            window_size=case.window_size,
            **pages,
        )

    return call


def _prepare_vllm(case: Case, inputs: Inputs) -> Call:
    """paged_attention_v2, whose keys lie as (pages, heads_kv, head_dim / x, PAGE, x), 16 bytes in x."""
    from vllm import _custom_ops

    x, cache = 16 // case.dtype.itemsize, Pages.of(case, inputs)
    k = cache.k.view(-1, cache.size, case.heads_kv, case.head_dim // x, x).permute(0, 2, 3, 1, 4).contiguous()
    v = cache.v.permute(0, 2, 3, 1).contiguous()
    q = inputs.q.squeeze(1)
    partitions = -(-case.kv_len // VLLM_PARTITION)
    sums, maxima = (
        torch.empty(case.batch, case.heads_q, partitions, dtype=torch.float32, device=case.device)
        for _ in range(2)
    )
    partial = q.new_empty(case.batch, case.heads_q, partitions, case.head_dim)
    one = torch.ones((), dtype=torch.float32, device=case.device)
    where = (cache.table, inputs.cache_seqlens)
    numbers = (cache.size, case.kv_len, None, "auto", one, one)

    def call() -> Tensor:
        out = torch.empty_like(q)
        scratch = (out, sums, maxima, partial)
        _custom_ops.paged_attention_v2(*scratch, q, k, v, case.heads_kv, case.scale, *where, *numbers)
        return out

    return call


PEERS = (
    Column.simple(
        "flash-attn",
        "flash_attn.flash_attn_with_kvcache (FlashAttention-2, its own splits)",
        _prepare_flash_attn,
        why_not=first_of(installed("flash_attn"), cuda_only, half_precision, pages_for_flash_attn),
    ),
    Column.simple(
        "flash-attn 3",
        "flash_attn_interface.flash_attn_with_kvcache (FlashAttention-3, its own splits)",
        _prepare_flash_attn_3,
        why_not=first_of(installed("flash_attn_interface"), cuda_only, half_precision),
    ),
    flash_infer.TENSOR_CORES,
    flash_infer.CUDA_CORES,
    flash_infer.XQA,
    xformers_splitk.SPLITK,
    Column.simple(
        "vLLM",
        f"paged_attention_v2 (pages of {PAGE}), cache laid out for it outside the timing",
        _prepare_vllm,
        why_not=first_of(
            installed("vllm"), cuda_only, pages_in(VLLM_PAGES), whole_pages(PAGE), one_token, no_window
        ),
    ),
)
