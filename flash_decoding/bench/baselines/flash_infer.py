"""FlashInfer's kernels over pages: on tensor cores, on CUDA cores, and XQA.

Its wrappers are planned on the host, for these very lengths, which is left outside the timing. XQA has no
plan.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flash_decoding.bench.baselines.able import (
    capability_in,
    cuda_only,
    first_of,
    group_in,
    half_precision,
    installed,
    one_token,
    pages_in,
    whole_pages,
)
from flash_decoding.bench.baselines.pages import PAGE, Pages
from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import Call, Column, WhyNot
from flash_decoding.bench.inputs import Inputs

WORKSPACE = 512 << 20
"""Bytes for FlashInfer's partial results; multi-query attention makes its planner ask for 384 MiB."""

CUDA_CORE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads per key/value head that the kernel without tensor cores is compiled for."""

XQA_PAGES = (16, 32, 64, 128)

XQA_GROUPS = range(1, 33)
"""XQA has the query heads of a key/value head in one tile of 32 rows."""

XQA_CAPABILITIES = (9, 10, 12)
"""Major numbers of the GPUs that XQA is compiled for."""


@functools.cache
def workspace(owner: str, device: torch.device) -> Tensor:
    """(WORKSPACE,) bytes, zero at first, as FlashInfer wants them.

    All calls of an owner share them, as all layers of a server do. XQA counts in its own.
    """
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def _prepare_tensor_cores(case: Case, inputs: Inputs) -> Call:
    return _verify(case, inputs) if case.q_len > 1 else _decode(case, inputs, use_tensor_cores=True)


def _prepare_cuda_cores(case: Case, inputs: Inputs) -> Call:
    return _decode(case, inputs, use_tensor_cores=False)


def _decode(case: Case, inputs: Inputs, *, use_tensor_cores: bool) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    pages = Pages.of(case, inputs)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace("wrappers", case.device), "NHD", use_tensor_cores=use_tensor_cores
    )
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
    return _running(wrapper, inputs.q, pages)


def _verify(case: Case, inputs: Inputs) -> Call:
    """Several query tokens, by the backend that splits keys: its own choice on Hopper does not."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    pages = Pages.of(case, inputs)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace("wrappers", case.device), "NHD", backend="fa2")
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
    return _running(wrapper, inputs.q, pages)


def _running(wrapper: Any, q: Tensor, pages: Pages) -> Call:
    """Calls of a planned wrapper; q as (batch, q_len, heads_q, head_dim)."""
    rows, cache = q.flatten(0, 1), (pages.k, pages.v)

    def call() -> Tensor:
        out: Tensor = wrapper.run(rows, cache)
        return out

    return call


def _prepare_xqa(case: Case, inputs: Inputs) -> Call:
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    pages = Pages.of(case, inputs)
    q, cache, scratch = inputs.q.squeeze(1), (pages.k, pages.v), workspace("xqa", case.device)

    def call() -> Tensor:
        out: Tensor = trtllm_batch_decode_with_kv_cache(
            q,
            cache,
            scratch,
            pages.table,
            inputs.cache_seqlens,
            case.kv_len,
            bmm1_scale=case.scale,
            bmm2_scale=1.0,
            window_left=case.window_size[0],
            kv_layout="NHD",
            backend="xqa",
        )
        return out

    return call


def _why_not(*more: WhyNot) -> WhyNot:
    return first_of(installed("flashinfer"), cuda_only, half_precision, whole_pages(PAGE), *more)


TENSOR_CORES = Column.simple(
    "FlashInfer",
    f"its paged wrappers on tensor cores (pages of {PAGE}), planned outside the timing for these lengths",
    _prepare_tensor_cores,
    why_not=_why_not(),
)
CUDA_CORES = Column.simple(
    "FlashInfer, CUDA cores",
    f"BatchDecodeWithPagedKVCacheWrapper without tensor cores (pages of {PAGE}), planned outside the timing",
    _prepare_cuda_cores,
    why_not=_why_not(one_token, group_in(CUDA_CORE_GROUPS)),
)
XQA = Column.simple(
    "FlashInfer XQA",
    f'trtllm_batch_decode_with_kv_cache(backend="xqa") (pages of {PAGE}), which needs no plan',
    _prepare_xqa,
    why_not=_why_not(one_token, group_in(XQA_GROUPS), pages_in(XQA_PAGES), capability_in(XQA_CAPABILITIES)),
)
