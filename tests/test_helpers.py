"""The tolerance lets honest rounding pass, and stops the mistakes that attention kernels make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.spec import KVCache
from tests.cases import CASES
from tests.helpers import Case, Inputs, assert_close_to_reference, eager_attend, make_inputs
from tests.inputs import WILD_PAGES, Layout

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LONG = Case(batch=2, seqlens=(1000, 300), capacity=1000, head_dim=64, sinks=True)


def rounded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The best that a call can return: the reference, rounded."""
    out, lse = reference.attend(*inputs)
    return out.to(inputs.queries.q.dtype), lse.float()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rounding_passes(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    out, lse = rounded(inputs)
    assert_close_to_reference(out, lse, *inputs)
    eager, _ = eager_attend(*inputs, dtype)
    assert_close_to_reference(eager, lse, *inputs)


def fewer_keys(inputs: Inputs) -> tuple[Tensor, Tensor]:
    cache = inputs.cache
    return rounded(inputs._replace(cache=dataclasses.replace(cache, cache_seqlens=cache.cache_seqlens - 1)))


def one_key_twice(inputs: Inputs) -> tuple[Tensor, Tensor]:
    k, v = inputs.cache.k.clone(), inputs.cache.v.clone()
    k[:, 1], v[:, 1] = k[:, 0], v[:, 0]
    return rounded(inputs._replace(cache=KVCache(k, v, inputs.cache.cache_seqlens)))


def wrong_head(inputs: Inputs) -> tuple[Tensor, Tensor]:
    flipped = KVCache(inputs.cache.k.flip(2), inputs.cache.v.flip(2), inputs.cache.cache_seqlens)
    return rounded(inputs._replace(cache=flipped))


def scale_off_by_two_percent(inputs: Inputs) -> tuple[Tensor, Tensor]:
    options = inputs.options
    return rounded(
        inputs._replace(options=dataclasses.replace(options, softmax_scale=1.02 * options.softmax_scale))
    )


def no_sinks(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return rounded(inputs._replace(options=dataclasses.replace(inputs.options, sinks=None)))


def lse_in_base_two(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = rounded(inputs)
    return out, lse / math.log(2)


def lse_through_bfloat16(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = rounded(inputs)
    return out, lse.bfloat16().float()


def one_element_lost(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = rounded(inputs)
    out[1, 0, 3, int(out[1, 0, 3].abs().argmax())] = 0
    return out, lse


def one_nan(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = rounded(inputs)
    out[0, 0, 0, 0] = math.nan
    return out, lse


def lse_of_nothing(inputs: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = rounded(inputs)
    lse[0, 0, 0] = -math.inf
    return out, lse


MISTAKES = [
    fewer_keys,
    one_key_twice,
    wrong_head,
    scale_off_by_two_percent,
    no_sinks,
    lse_in_base_two,
    lse_through_bfloat16,
    one_element_lost,
    one_nan,
    lse_of_nothing,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_mistakes_are_stopped(mistake: Callable[[Inputs], tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    inputs = make_inputs(dataclasses.replace(LONG, dtype=dtype))
    out, lse = mistake(inputs)
    with pytest.raises(AssertionError):
        assert_close_to_reference(out, lse, *inputs)


def test_low_precision_products_are_not_fp32() -> None:
    inputs = make_inputs(LONG)
    queries, cache, options = inputs
    halved = KVCache(cache.k.half().float(), cache.v, cache.cache_seqlens)
    out, _ = rounded(Inputs(queries, halved, options))
    with pytest.raises(AssertionError, match="out of sequence"):
        assert_close_to_reference(out, None, *inputs)


def test_an_empty_row_must_be_zero_exactly() -> None:
    inputs = make_inputs(Case(seqlens=(0, 5)))
    out, lse = rounded(inputs)
    out[0] = 1e-30
    with pytest.raises(AssertionError):
        assert_close_to_reference(out, lse, *inputs)


def test_wrong_dtypes_and_shapes_are_stopped() -> None:
    inputs = make_inputs(Case(dtype=torch.float16))
    out, lse = rounded(inputs)
    for wrong_out, wrong_lse in ((out.float(), lse), (out, lse.double()), (out[:, 0], lse), (out, lse[:, 0])):
        with pytest.raises(AssertionError):
            assert_close_to_reference(wrong_out, wrong_lse, *inputs)


def test_dead_slots_are_poisoned_and_dead_table_entries_wild() -> None:
    cache = make_inputs(Case(batch=1, seqlens=(5,), page_size=4, capacity=16)).cache
    assert cache.block_table is not None
    live = cache.block_table[0, :2].tolist()
    assert [int(page) in WILD_PAGES for page in cache.block_table[0]] == [False, False, True, True]
    assert not cache.k[live[0]].isnan().any()
    assert cache.v[live[1], 1:].isnan().all()
    assert int((~cache.k.isnan()).sum()) == 5 * cache.k[0, 0].numel()


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "padded"])
def test_layouts_hold_the_same_values(layout: Layout) -> None:
    plain, other = make_inputs(Case()), make_inputs(Case(layout=layout))
    assert torch.equal(plain.cache.k, other.cache.k)
    assert torch.equal(plain.queries.q, other.queries.q)
    assert other.cache.k.stride(-1) == 1
    assert (plain.cache.k.stride() == other.cache.k.stride()) == (layout == "bshd")
