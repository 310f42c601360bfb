"""The contracts of DESIGN.md one by one, through what callers use: C1 to C5, on results.

A test or two stand for each, so that it can be read in one piece; other files go deeper, into every feature
and path. C6 to C10 are in ``test_contracts_calls.py``, addresses beyond 2**31 elements in ``test_on_gpu.py``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_decoding as fd
from flash_decoding.spec import KVCache, Queries
from tests.contract_tools import (
    allocated,
    on_every_device,
    same_bits,
    seen_otherwise,
    sees,
    step,
    waiting_is_an_error,
    ways_to_an_lse,
    with_unused_pages,
    writable,
)
from tests.helpers import UNIT_FP32, Case, Inputs, assert_close_to_reference, make_inputs
from tests.refusals import Arguments
from tests.test_api import attend


@on_every_device
def test_c01_the_lse_is_fp32_and_natural_wherever_it_is_seen(device: str) -> None:
    """n scores of 0 have the LSE ln n: up to a hardware logarithm and the roundings of the result."""
    want = torch.tensor([3.0, 290.0], dtype=torch.float64, device=device).log()[:, None]
    for way, lse in ways_to_an_lse(device).items():
        assert lse.dtype == torch.float32, way
        assert lse.shape == ((4, 2) if "ragged" in way else (2, 4, 1)), way
        rows = lse.t() if "ragged" in way else lse[..., 0]
        assert ((rows - want).abs() <= (8 + 4 * want) * UNIT_FP32).all(), way


@on_every_device
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_c01_a_row_that_sees_nothing_is_written(ragged: bool, sinks: bool, device: str) -> None:
    """A sequence without keys, and one whose first token comes before its 2 keys; fresh memory holds NaN.

    A sink may go to base 2 and back twice, in a kernel and in the merge: 4 products with rounded constants.
    """
    q_lens = (3, 3) if ragged else None
    case = Case(capacity=300, seqlens=(0, 2), q_len=3, q_lens=q_lens, causal=True, sinks=sinks)
    inputs = make_inputs(case, device=device)
    sink = inputs.options.sinks
    for num_splits in (0, 1, 3):
        out, lse = attend(inputs, case, num_splits=num_splits)
        lse = lse.t() if ragged else lse.transpose(1, 2).flatten(0, 1)
        assert out.flatten(0, -3)[:4].count_nonzero() == 0
        if sink is None:
            assert (lse[:4] == -math.inf).all()
        else:
            assert ((lse[:4] - sink).abs() <= 8 * UNIT_FP32 * sink.abs()).all()
        assert lse[4:].isfinite().all()


@on_every_device
def test_c01_empty_states_merge_to_an_empty_state(device: str) -> None:
    outs = torch.full((3, 1, 1, 4, 16), math.nan, device=device)
    out, lse = fd.merge_attention(outs, torch.full((3, 1, 4, 1), -math.inf, device=device))
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()


@on_every_device
@pytest.mark.parametrize("view", ["heads first", "wider rows", "wider table", "shared row"])
def test_c02_tensors_are_addressed_by_their_strides(view: str, device: str) -> None:
    inputs, case = seen_otherwise(view, device)
    given = (inputs.cache.k, inputs.cache.block_table)
    assert any(x is not None and not x.is_contiguous() for x in given)
    for num_splits in (0, 3):
        out, lse = attend(inputs, case, num_splits=num_splits)
        assert_close_to_reference(out, lse, *inputs)


@on_every_device
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("page_size", [0, 16])
def test_c02_no_call_copies_a_cache(page_size: int, layout: Any, device: str) -> None:
    """Nothing that a call allocates is as large as a cache; expanding its heads would take 4 times that."""
    case = Case(batch=1, heads_q=8, head_dim=64, capacity=2**15, dtype=torch.bfloat16, layout=layout)
    case = dataclasses.replace(case, page_size=page_size, seqlens=(2**15 - 1,))
    inputs = make_inputs(case, device=device)
    k, v = (torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16, device=device) for _ in "kv")
    cache_bytes = inputs.cache.k.numel() * inputs.cache.k.element_size()
    assert allocated(lambda: attend(inputs, case), device) < cache_bytes
    assert allocated(lambda: fd.append_kv(k, v, **writable(inputs.cache)), device) < cache_bytes


@on_every_device
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, -1), (-1, 1), (100, 1)], ids=str)
def test_c03_masks_are_inclusive_and_aligned_to_the_last_key(
    window: tuple[int, int], causal: bool, device: str
) -> None:
    """Values are unit vectors and scores 0, so an output row shows the weight of each slot."""
    lengths, slots = (256, 77, 2), 256
    q, k = torch.zeros(3, 4, 2, 16, device=device), torch.randn(3, slots, 2, 16, device=device)
    v = torch.eye(slots, device=device)[None, :, None].expand(3, -1, 2, -1)
    bounds = (window[0], 0 if causal else window[1])
    want = torch.tensor([[[sees(s, i, n, bounds) for s in range(slots)] for i in range(4)] for n in lengths])
    live = torch.tensor(lengths, dtype=torch.int32, device=device)
    for num_splits in (1, 4):
        mask: Arguments = {"causal": causal, "window_size": window, "num_splits": num_splits}
        out = fd.decode_attention(q, k, v, cache_seqlens=live, **mask)
        assert isinstance(out, Tensor)
        assert torch.equal(out.cpu() > 0, want[:, :, None].expand(-1, -1, 2, -1))


def test_c04_no_call_looks_at_a_value() -> None:
    """Fake tensors have shapes and no values: asking for one is an error."""
    case = Case()
    queries, cache, options = make_inputs(case)
    with FakeTensorMode() as mode:
        q, k, v, lengths = map(mode.from_tensor, (queries.q, cache.k, cache.v, cache.cache_seqlens))
        out, lse, *_ = step(Inputs(Queries(q), KVCache(k, v, lengths), options), case)
    assert out.shape == (2, 1, 4, 32)
    assert lse.shape == (2, 4, 1)


@pytest.mark.gpu
def test_c04_no_call_waits_for_the_device() -> None:
    case = Case(seqlens=(9, 50), dtype=torch.float16)
    inputs = make_inputs(case, device="cuda", poison=0.0)
    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error():
        inputs.cache.cache_seqlens.tolist()
    with waiting_is_an_error():
        out, lse, *_ = step(inputs, case)
    assert out.isfinite().all()
    assert lse.isfinite().all()


@pytest.mark.gpu
def test_c04_one_graph_holds_for_every_length() -> None:
    case = Case(dtype=torch.float16, heads_q=8, capacity=512)
    inputs = make_inputs(case, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, case)
    for length in (0, 1, 333, 512):
        inputs.cache.cache_seqlens.fill_(length)
        graph.replay()
        assert_close_to_reference(out, lse, *inputs)


@on_every_device
@pytest.mark.parametrize("page_size", [0, 8])
def test_c05_what_lies_beyond_the_lengths_changes_no_bit(page_size: int, device: str) -> None:
    """Dead slots, tails of last pages and unused entries of the table, whatever they hold."""
    case = Case(batch=3, page_size=page_size, capacity=304, seqlens=(0, 150, 141), q_len=2, causal=True)
    clean = make_inputs(case, device=device, poison=0.0)
    for num_splits in (1, 4):
        want = attend(clean, case, num_splits=num_splits)
        for poison in (math.nan, math.inf, -math.inf):
            for page in (-1, 0, 2**31 - 1):
                inputs = with_unused_pages(make_inputs(case, device=device, poison=poison), page)
                assert same_bits(attend(inputs, case, num_splits=num_splits), want)


@on_every_device
def test_c05_lengths_outside_the_cache_stay_inside(device: str) -> None:
    """The middle two rows of a pool, so that there is memory on both sides to stray into."""
    case = Case(batch=4, capacity=200)
    queries, pool, options = make_inputs(case, device=device)
    k, v, pool_k = pool.k[1:3], pool.v[1:3], pool.k.clone()
    results = []
    for lengths in ((200, 0), (201, -1), (2**31 - 1, -(2**31))):
        live = torch.tensor(lengths, dtype=torch.int32, device=device)
        results.append(attend(Inputs(Queries(queries.q[1:3]), KVCache(k, v, live), options), case))
    fd.append_kv(k[:, :2] + 1, v[:, :2], k, v, cache_seqlens=live.clamp(min=199))
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])
    pool_k[2, 199] = pool_k[2, 0] + 1  # the one token that has a slot
    assert torch.equal(pool.k, pool_k)
