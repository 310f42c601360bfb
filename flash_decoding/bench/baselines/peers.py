"""Other attention libraries, each timed only where it is installed.

One function per library, called the way its own documentation shows for decoding over a KV cache;
plans, biases, page tables and changed cache layouts are made outside the timed call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_decoding.bench.baselines.able import (
    cuda_only,
    first_of,
    installed,
    no_pages,
    no_window,
    one_token,
    whole_pages,
)
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column
from flash_decoding.bench.inputs import Inputs

PAGE = 16
"""Tokens per page where a library knows only paged caches."""

WORKSPACE = 128 << 20
"""Bytes that FlashInfer's wrappers want."""

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


def pages_for_vllm(case: Case) -> str | None:
    """The ``why_not`` of vLLM's kernel, of pages alone."""
    is_odd = case.page_size and case.page_size not in VLLM_PAGES
    return f"takes pages of {', '.join(map(str, VLLM_PAGES))}, not {case.page_size}" if is_odd else None


@dataclass(frozen=True, eq=False)
class Pages:
    """A cache as pages; a contiguous one as pages of :data:`PAGE` in order, without a copy."""

    k: Tensor
    """(pages, size, heads_kv, head_dim)."""
    v: Tensor
    table: Tensor
    """(batch, max_pages) int32."""
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.k.shape[1]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Pages:
        """The pages of one input set."""
        if inputs.block_table is not None:
            return cls(inputs.k, inputs.v, inputs.block_table, case.live)
        k, v = (x.view(-1, PAGE, *x.shape[2:]) for x in (inputs.k, inputs.v))
        table = torch.arange(k.shape[0], dtype=torch.int32, device=k.device).view(case.batch, -1)
        return cls(k, v, table, case.live)

    def in_a_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each sequence's pages start, the pages one after the other, and tokens in each last page."""
        counts = [-(-length // self.size) for length in self.lengths]
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        owned = [row[:count] for row, count in zip(self.table, counts, strict=True)]
        last = torch.tensor([(length - 1) % self.size + 1 for length in self.lengths], dtype=torch.int32)
        device = self.k.device
        return starts.to(device), torch.cat(owned), last.to(device)


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


def _prepare_flashinfer_single(case: Case, inputs: Inputs) -> Call:
    from flashinfer import single_decode_with_kv_cache

    q, k, v = inputs.q[0, 0], inputs.k[0], inputs.v[0]

    def call() -> Tensor:
        out: Tensor = single_decode_with_kv_cache(q, k, v, kv_layout="NHD", use_tensor_cores=True)
        return out

    return call


def _prepare_flashinfer(case: Case, inputs: Inputs) -> Call:
    """The paged wrappers; a contiguous cache is seen as pages in order. Their plans know the lengths."""
    if case.batch == 1 and not (case.page_size or case.window) and case.q_len == 1:
        return _prepare_flashinfer_single(case, inputs)
    pages = Pages.of(case, inputs)
    run = _flashinfer_decode if case.q_len == 1 else _flashinfer_verify
    return run(case, inputs.q.flatten(0, 1), pages)


def _flashinfer_decode(case: Case, q: Tensor, pages: Pages) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=case.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        *pages.in_a_row(),
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        pages.size,
        window_left=case.window_size[0],
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )
    return _running(wrapper, q, pages)


def _flashinfer_verify(case: Case, q: Tensor, pages: Pages) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=case.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    wrapper.plan(
        torch.arange(case.batch + 1, dtype=torch.int32, device=case.device) * case.q_len,
        *pages.in_a_row(),
        case.heads_q,
        case.heads_kv,
        case.head_dim,
        pages.size,
        causal=True,
        window_left=case.window_size[0],
        q_data_type=case.dtype,
        kv_data_type=case.dtype,
    )
    return _running(wrapper, q, pages)


def _running(wrapper: Any, q: Tensor, pages: Pages) -> Call:
    """Calls of a planned wrapper."""

    def call() -> Tensor:
        out: Tensor = wrapper.run(q, (pages.k, pages.v))
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
        kv_seqlen=list(case.live),
        device=case.device,
    )

    def call() -> Tensor:
        out: Tensor = fmha.memory_efficient_attention_forward(q, k, v, attn_bias=bias)
        return out

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
        why_not=first_of(installed("flash_attn"), cuda_only, pages_for_flash_attn),
    ),
    Column.simple(
        "flash-attn 3",
        "flash_attn_interface.flash_attn_with_kvcache (FlashAttention-3, its own splits)",
        _prepare_flash_attn_3,
        why_not=first_of(installed("flash_attn_interface"), cuda_only),
    ),
    Column.simple(
        "FlashInfer",
        f"single decode at batch 1, else its paged wrappers (pages of {PAGE}), planned outside the timing",
        _prepare_flashinfer,
        why_not=first_of(installed("flashinfer"), cuda_only, whole_pages(PAGE)),
    ),
    Column.simple(
        "xFormers",
        "memory_efficient_attention_forward, padded keys, grouped heads expanded without a copy",
        _prepare_xformers,
        why_not=first_of(installed("xformers"), cuda_only, no_pages, no_window),
    ),
    Column.simple(
        "vLLM",
        f"paged_attention_v2 (pages of {PAGE}), cache laid out for it outside the timing",
        _prepare_vllm,
        why_not=first_of(
            installed("vllm"), cuda_only, pages_for_vllm, whole_pages(PAGE), one_token, no_window
        ),
    ),
)
