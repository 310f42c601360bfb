"""The CPU path against the specification: every feature, any combination, no copies, bounded memory."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from flash_decoding import cpu
from flash_decoding.errors import InvalidInput
from flash_decoding.spec import KVCache, Options, Queries
from tests.cases import CASES
from tests.helpers import Case, Inputs, assert_close_to_reference, make_inputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_feature_in_every_dtype(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    out, lse = cpu.attend(*inputs)
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("walk", [(1, 0), (3, 0), (1000, 0), (0, 1), (0, 7), (0, 10**6)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_walk_over_the_keys(case: Case, walk: tuple[int, int]) -> None:
    inputs = make_inputs(case)
    out, lse = cpu.attend(*inputs, num_splits=walk[0], split_tokens=walk[1])
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unused_slots_change_no_bit(case: Case) -> None:
    clean, poisoned = (cpu.attend(*make_inputs(case, poison=poison)) for poison in (0.0, math.nan))
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any combination of what a call can have, small."""
    batch, page_size = draw(st.integers(1, 5)), draw(st.sampled_from([0, 1, 5, 16]))
    heads_kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    capacity = draw(st.integers(1, 90))
    per_sequence = st.tuples(*[st.integers(0, capacity)] * batch)
    packed = page_size == 0 and draw(st.booleans())
    case = Case(
        batch=batch,
        q_len=draw(st.sampled_from([1, 2, 70])),
        heads_q=heads_kv * group,
        heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 40])),
        head_dim_v=draw(st.sampled_from([0, 0, 0, 16])),
        capacity=capacity,
        page_size=page_size,
        dtype=draw(st.sampled_from(DTYPES)),
        seqlens=tuple(n + packed for n in draw(per_sequence)),
        layout=draw(st.sampled_from(["bshd", "bhsd", "padded"])),
        causal=draw(st.booleans()),
        window=draw(st.just((-1, -1)) | st.tuples(st.integers(-1, 40), st.integers(-1, 40))),
        softcap=draw(st.sampled_from([0.0, 0.0, 0.0, 2.0])),
        alibi=draw(st.sampled_from(["", "", "", "heads", "batch"])),
        sinks=draw(st.booleans()),
        key_mask=draw(st.sampled_from(["", "", "", "holes", "short", "far", "none"])),
    )
    if draw(st.booleans()):
        q_lens = draw(st.tuples(*[st.sampled_from([0, 1, 1, 9])] * (batch - 1)))
        case = dataclasses.replace(case, q_lens=(*q_lens, 2))
    if packed:
        return dataclasses.replace(case, packed=True)
    leftpad = draw(st.none() | per_sequence)
    return dataclasses.replace(
        case, leftpad=leftpad, batch_idx=draw(st.booleans()), new_tokens=draw(st.sampled_from([0, 3]))
    )


@hypothesis_settings(max_examples=100)
@given(cases(), st.integers(0, 4), st.sampled_from([0, 0, 5]))
def test_any_combination(case: Case, num_splits: int, split_tokens: int) -> None:
    inputs = make_inputs(case)
    out, lse = cpu.attend(*inputs, num_splits=num_splits, split_tokens=split_tokens)
    assert_close_to_reference(out, lse, *inputs)


LONG = Case(batch=1, heads_q=8, heads_kv=1, head_dim=16, capacity=5000, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(LONG, name="one head"),
        dataclasses.replace(LONG, name="a head each", heads_kv=8, batch=2),
        dataclasses.replace(LONG, name="paged", page_size=64, sinks=True),
        dataclasses.replace(LONG, name="causal", q_len=3, causal=True, batch=3, batch_idx=True),
        dataclasses.replace(LONG, name="all kinds of lengths", batch=4, seqlens=(5000, 4001, 3, 1100)),
        dataclasses.replace(LONG, name="softcap", softcap=3.0, seqlens=(4999,)),
    ],
    ids=str,
)
def test_contexts_of_many_chunks(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    for num_splits in (0, 1, 3):
        out, lse = cpu.attend(*inputs, num_splits=num_splits)
        assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads(threads: int) -> None:
    inputs = make_inputs(dataclasses.replace(LONG, dtype=torch.float32))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = cpu.attend(*inputs)
    finally:
        torch.set_num_threads(before)
    assert_close_to_reference(out, lse, *inputs)


def alone(inputs: Inputs, b: int) -> Inputs:
    """Sequence ``b`` of a dense call in a call of its own."""
    queries, cache, options = inputs
    row = KVCache(
        cache.k if cache.block_table is not None else cache.k[b : b + 1],
        cache.v if cache.block_table is not None else cache.v[b : b + 1],
        cache.cache_seqlens[b : b + 1],
        None if cache.block_table is None else cache.block_table[b : b + 1],
    )
    return Inputs(Queries(queries.q[b : b + 1]), row, options)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_with_fixed_splits_neighbours_change_no_bit(page_size: int, dtype: torch.dtype) -> None:
    case = Case(batch=6, seqlens=(300, 300, 17, 1, 299, 0), capacity=300, page_size=page_size, dtype=dtype)
    inputs = make_inputs(case)
    together = cpu.attend(*inputs, split_tokens=64)
    for b in range(case.batch):
        single = cpu.attend(*alone(inputs, b), split_tokens=64)
        assert all(torch.equal(x[b], y[0]) for x, y in zip(together, single, strict=True))


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = make_inputs(Case(batch=5, seqlens=(300, 300, 17, 1, 299), capacity=300, dtype=torch.float16))
    first = cpu.attend(*inputs)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, cpu.attend(*inputs), strict=True))


def allocations(inputs: Inputs) -> tuple[int, int]:
    """Bytes that one call allocates: (by its largest operator, together)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        cpu.attend(*inputs)
    sizes = [event.self_cpu_memory_usage for event in recorded.events()]
    return max(sizes), sum(size for size in sizes if size > 0)


BIG = Case(name="big", batch=1, heads_q=8, heads_kv=2, head_dim=64, capacity=2**16, dtype=torch.bfloat16)
MEGABYTE = 2**20


@pytest.mark.parametrize(
    "case",
    [
        BIG,
        dataclasses.replace(BIG, name="paged", page_size=16, capacity=2**15),
        dataclasses.replace(BIG, name="paged, heads first", page_size=64, capacity=2**15, layout="bhsd"),
        dataclasses.replace(BIG, name="heads first", layout="bhsd"),
        dataclasses.replace(BIG, name="wider rows", layout="padded"),
        dataclasses.replace(BIG, name="fp32", dtype=torch.float32, capacity=2**15),
        dataclasses.replace(BIG, name="short sequences", batch=32, capacity=2**10),
        dataclasses.replace(BIG, name="by index", batch=8, capacity=2**13, batch_idx=True),
    ],
    ids=str,
)
def test_no_operator_copies_a_cache(case: Case) -> None:
    inputs = make_inputs(case)
    cache_bytes = inputs.cache.k.numel() * inputs.cache.k.element_size()
    assert cache_bytes >= 8 * MEGABYTE
    largest, _ = allocations(inputs)
    # The buffer of one chunk in fp32 is 4 MB, or what a conversion needs on its way.
    assert largest <= 4.1 * MEGABYTE


def test_keys_in_fp32_are_read_where_they_lie() -> None:
    case = dataclasses.replace(BIG, dtype=torch.float32, batch=8, capacity=2**11)
    inputs = make_inputs(case)
    assert allocations(inputs)[1] < inputs.cache.k.numel() * inputs.cache.k.element_size() / 4


def test_memory_of_a_long_prompt_is_bounded() -> None:
    case = Case(batch=1, heads_q=4, heads_kv=2, head_dim=16, q_len=2000, capacity=2000, causal=True)
    scores = 4 * 2000 * 2000 * 4
    assert allocations(make_inputs(case))[0] < scores / 8


@pytest.mark.parametrize("page", [-1, 10**6])
def test_a_page_that_does_not_exist_is_refused(page: int) -> None:
    queries, cache, options = make_inputs(Case(page_size=8, seqlens=(20, 5)))
    assert cache.block_table is not None
    cache.block_table[0, 1] = page
    with pytest.raises(InvalidInput, match="block_table"):
        cpu.attend(queries, cache, options)


def test_a_row_that_does_not_exist_is_refused() -> None:
    queries, cache, options = make_inputs(Case(batch_idx=True))
    assert cache.cache_batch_idx is not None
    cache.cache_batch_idx[1] = 4
    with pytest.raises(InvalidInput, match="cache_batch_idx"):
        cpu.attend(queries, cache, options)


PROMPTS = [
    Case(name="causal", causal=True),
    Case(name="all see all"),
    Case(name="half filled, rows in order", seqlens=(80, 80), leftpad=(0, 0), causal=True, layout="bhsd"),
    Case(name="one head each", heads_kv=4, softmax_scale=0.2, layout="padded"),
    Case(name="shorter than the keys", causal=True, q_len=70),
    Case(name="lengths differ", seqlens=(79, 80)),
    Case(name="window", window=(20, 0)),
    Case(name="softcap", softcap=1.0),
    Case(name="paged", page_size=16),
    Case(name="values differ", head_dim_v=16),
    Case(name="ragged", q_lens=(80, 80)),
    Case(name="empty", seqlens=(0, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_prompts(case: Case, dtype: torch.dtype) -> None:
    q_len = 80 if case.q_len == 1 else case.q_len
    inputs = make_inputs(dataclasses.replace(case, q_len=q_len, capacity=80, dtype=dtype))
    out, lse = cpu.attend(*inputs)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert_close_to_reference(out, lse, *inputs)


def test_inputs_are_left_as_they_are() -> None:
    inputs = make_inputs(Case(softcap=1.0, sinks=True, alibi="heads", q_len=3))
    queries, cache, options = inputs
    tensors = (queries.q, cache.k, cache.v, cache.cache_seqlens, options.sinks, options.alibi_slopes)
    copies = [tensor.clone() for tensor in tensors if tensor is not None]
    cpu.attend(*inputs)
    kept = [tensor for tensor in tensors if tensor is not None]
    assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))


def test_huge_scores_do_not_overflow() -> None:
    queries, cache, _ = make_inputs(Case(capacity=40))
    for scale in (1e4, -1e4):
        inputs = Inputs(queries, cache, Options(softmax_scale=scale))
        out, lse = cpu.attend(*inputs, split_tokens=8)
        assert_close_to_reference(out, lse, *inputs)
