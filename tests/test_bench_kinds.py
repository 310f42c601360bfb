"""The kinds of serving work: what they read, how they lie, and that the gate sees their structure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flash_decoding.bench.baselines import ours
from flash_decoding.bench.cases import Case
from flash_decoding.bench.check import Truth
from flash_decoding.bench.inputs import Inputs, make_inputs
from flash_decoding.bench.serving.kinds import KINDS, serving_cases, shape_of

CPU = torch.device("cpu")
MIB = 1 << 20

BYTES = {
    "mha-32-32": 256 * MIB,
    "gqa-32-8": 256 * MIB,
    "gqa-32-8-1gib": 1024 * MIB,
    "gqa-64-8": 256 * MIB,
    "gqa-40-8": 256 * MIB,
    "mha-32-32-dim64": 256 * MIB,
    "gqa-32-8-dim64": 256 * MIB,
    "gqa-32-8-dim256": 256 * MIB,
    "ragged-16k-pages16": 233376 * 4096,
    "ragged-16k-pages16-dim256": 233376 * 8192,
    "one-128k-among-512-pages64": (131072 + 63 * 512) * 4096,
    "verify-q1": 80000 * 4096,
    "verify-q2": 80000 * 4096,
    "verify-q4": 80000 * 4096,
    "verify-q8": 80000 * 4096,
    "verify-q4-pages16": 80000 * 4096,
    "verify-q4-dim256": 40000 * 8192,
    "mqa-48-1": 64 * MIB,
    "single-1m-8-1": 512 * MIB,
    "single-4096-32-8": 16 * MIB,
    "single-512-64-8": 2 * MIB,
    "single-256-32-8": 1 * MIB,
    "batch-256-of-256": 256 * MIB,
    "window-4096-of-64k": 256 * MIB,
}
"""Tokens that are read x key and value x KV heads x head_dim x 2 bytes, by hand."""


def on_gpu(name: str) -> Case:
    """A case in its full size; nothing is allocated."""
    (case,) = serving_cases(torch.device("cuda"), torch.bfloat16, name)
    return case


def on_cpu(name: str) -> Case:
    (case,) = serving_cases(CPU, torch.bfloat16, name)
    return case


@pytest.mark.parametrize(("name", "wanted"), BYTES.items())
def test_bytes_are_those_counted_by_hand(name: str, wanted: int) -> None:
    assert on_gpu(name).kv_bytes == wanted


def test_every_kind_is_counted_and_has_a_name_of_its_own() -> None:
    assert sorted(kind.name for kind in KINDS) == sorted(BYTES)


def test_ragged_lengths_are_always_the_same_from_1_to_16k() -> None:
    case = on_gpu("ragged-16k-pages16")
    assert (case.batch, case.page_size, min(case.lengths), max(case.lengths)) == (32, 16, 1, 16384)
    assert case.kv_bytes == sum(case.lengths) * 4096
    assert sum(case.lengths) == 233376
    assert len(set(case.lengths)) == 32


def test_one_long_sequence_stands_in_the_middle() -> None:
    case = on_gpu("one-128k-among-512-pages64")
    assert case.lengths == (*[512] * 32, 131072, *[512] * 31)
    assert case.kv_len == 131072


def test_a_cpu_keeps_the_structure() -> None:
    assert {shape_of(on_cpu(kind.name)).split(", ")[1] for kind in KINDS} == {
        shape_of(on_gpu(kind.name)).split(", ")[1] for kind in KINDS
    }
    assert on_cpu("ragged-16k-pages16").kv_len == 512
    assert min(on_cpu("ragged-16k-pages16").lengths) == 1
    assert on_cpu("one-128k-among-512-pages64").lengths == (*[16] * 8, 4096, *[16] * 7)
    assert (on_cpu("window-4096-of-64k").window, on_cpu("window-4096-of-64k").kv_len) == (128, 2048)
    assert [on_cpu(f"verify-q{n}").q_len for n in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert max(on_cpu(kind.name).kv_bytes for kind in KINDS) <= 20 * MIB


def test_pages_are_shuffled_and_each_is_used_once() -> None:
    case = on_cpu("ragged-16k-pages16")
    inputs = make_inputs(case, seed=0)
    assert inputs.block_table is not None
    counts = [-(-length // 16) for length in case.lengths]
    owned = torch.cat([row[:count] for row, count in zip(inputs.block_table, counts, strict=True)])
    assert inputs.k.shape == (sum(counts), 16, 8, 128)
    assert sorted(owned.tolist()) == list(range(sum(counts)))
    assert owned.tolist() != sorted(owned.tolist())
    assert inputs.cache_seqlens.tolist() == list(case.lengths)
    assert inputs.block_table.dtype == inputs.cache_seqlens.dtype == torch.int32


def test_equal_lengths_are_told_on_the_device_too() -> None:
    inputs = make_inputs(on_cpu("gqa-32-8"), seed=0)
    assert inputs.block_table is None
    assert inputs.cache_seqlens.tolist() == [128] * 4


SMALL = replace(on_cpu("gqa-32-8"), batch=2, kv_len=96, heads_q=4, heads_kv=2, head_dim=32)
STRUCTURES = {
    "pages": replace(SMALL, lengths=(33, 96), page_size=16),
    "a window": replace(SMALL, window=24),
    "drafts": replace(SMALL, q_len=3),
    "short beside long": replace(SMALL, kv_len=2048, lengths=(1, 2048), page_size=16),
}


def off(case: Case, inputs: Inputs, **changes: object) -> Tensor:
    """Our result where something of the case is not told as it is."""
    return ours.PLANNED.ways[0].prepare(replace(case, **changes), inputs)()  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize("case", STRUCTURES.values(), ids=STRUCTURES)
def test_a_key_too_few_or_too_many_fails_the_check(case: Case) -> None:
    inputs = make_inputs(case, seed=0)
    truth = Truth.of(case, inputs)
    assert truth.rows.tolist() == [0, 1]
    assert truth.judge("ours", off(case, inputs)).passed
    for change in (-1, 1):
        lengths = inputs.cache_seqlens.clone()
        lengths[1] = min(int(lengths[1]) + change, case.kv_len)
        if not torch.equal(lengths, inputs.cache_seqlens):
            assert not truth.judge("ours", off(case, replace(inputs, cache_seqlens=lengths))).passed
    if case.window:
        for window in (case.window - 1, case.window + 1):
            assert not truth.judge("ours", off(case, inputs, window=window)).passed


def test_reading_the_tail_of_a_page_fails_the_check() -> None:
    case = STRUCTURES["pages"]
    inputs = make_inputs(case, seed=0)
    lengths = inputs.cache_seqlens.clone()
    lengths[0] += 1
    assert not Truth.of(case, inputs).judge("ours", off(case, replace(inputs, cache_seqlens=lengths))).passed


def test_drafts_that_see_what_is_behind_them_fail_the_check() -> None:
    case = STRUCTURES["drafts"]
    inputs = make_inputs(case, seed=0)
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    with_all = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert not Truth.of(case, inputs).judge("peer", with_all.transpose(1, 2)).passed


def test_large_outputs_of_short_sequences_do_not_widen_the_budget_of_long_ones() -> None:
    case = STRUCTURES["short beside long"]
    inputs = make_inputs(case, seed=0)
    truth = Truth.of(case, inputs)
    right = off(case, inputs)
    spoilt = right.clone()
    spoilt[1] += 0.05 * right[1].abs().max()
    assert float((spoilt - right).abs().max()) < truth.budget * float(right[0].abs().max())
    assert not truth.judge("ours", spoilt).passed


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, -1)], ids=["first", "last"])
def test_losing_one_end_of_a_million_keys_fails_the_check(kept: slice) -> None:
    case = replace(SMALL, batch=1, kv_len=1 << 20, heads_q=2, heads_kv=1)
    inputs = make_inputs(case, seed=0)
    truth = Truth.of(case, inputs)
    fewer = replace(inputs, k=inputs.k[:, kept], v=inputs.v[:, kept], cache_seqlens=inputs.cache_seqlens - 1)
    assert truth.judge("ours", off(case, inputs)).passed
    assert not truth.judge("ours", off(case, fewer)).passed
