"""``flash_attn_with_kvcache`` in every combination: an append of the reference, then its attention."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.flash_attn import flash_attn_with_kvcache
from flash_decoding.spec import KVCache, NewTokens, Options, Queries, Rotary
from tests.helpers import Case, assert_close_to_reference, make_inputs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16),
    "page_size": (0, 1, 5, 16),
    "new_tokens": (0, 1, 3),
    "rotary": ("", "interleaved", "halves"),
    "rotary_dim": (16, 32),
    "leftpad": (False, True),
    "batch_idx": (False, True),
    "q_len": (1, 4),
    "heads_q": (2, 6),
    "head_dim_v": (32, 48),
    "layout": ("bshd", "bhsd", "padded"),
    "mask": ("none", "causal", "window", "causal_window", "wide_window"),
    "softcap": (0.0, 2.0),
    "alibi": ("", "heads", "batch"),
    "sinks": (False, True),
    "num_splits": (0, 1, 3),
    "return_lse": (False, True),
    "int_length": (False, True),
}
MASKS: dict[str, tuple[bool, tuple[int, int]]] = {
    "none": (False, (-1, -1)),
    "causal": (True, (-1, -1)),
    "window": (False, (6, 2)),
    "causal_window": (True, (9, -1)),
    "wide_window": (False, (1000, 1000)),
}

Combination = dict[str, Any]


def pairs(combination: Combination) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations(combination.items(), 2))


def possible(combination: Combination) -> bool:
    return combination["new_tokens"] > 0 or not combination["rotary"]


def covering_sample(seed: int) -> list[Combination]:
    """Combinations that hold every possible pair of values, found at random and greedily."""
    chance = random.Random(seed)
    missing: set[Any] = set()
    for (a, values_a), (b, values_b) in itertools.combinations(AXES.items(), 2):
        missing |= {((a, x), (b, y)) for x in values_a for y in values_b}
    missing -= {(("new_tokens", 0), ("rotary", layout)) for layout in ("interleaved", "halves")}
    sample = []
    while missing:
        drawn = [{name: chance.choice(values) for name, values in AXES.items()} for _ in range(40)]
        best = max(filter(possible, drawn), key=lambda combination: len(pairs(combination) & missing))
        missing -= pairs(best)
        sample.append(best)
    return sample


class Call(NamedTuple):
    """One call in records, with what goes in beside the cache."""

    queries: Queries
    cache: KVCache
    options: Options
    new: NewTokens | None


def make_call(combination: Combination, device: str, seed: int) -> Call:
    c = combination
    causal, window = MASKS[c["mask"]]
    lengths = (20, 20, 20) if c["int_length"] else (3, 20, 37)
    own = ("dtype", "page_size", "new_tokens", "batch_idx", "q_len", "heads_q", "head_dim_v", "layout")
    case = Case(
        **{name: c[name] for name in own},
        batch=3,
        capacity=41,
        seqlens=lengths,
        leftpad=(2, 0, 19) if c["leftpad"] else None,
        causal=causal,
        window=window,
        softcap=c["softcap"],
        alibi=c["alibi"],
        sinks=c["sinks"],
    )
    queries, cache, options = make_inputs(case, device=device, seed=seed)
    if not c["new_tokens"]:
        return Call(queries, cache, options, None)
    shape = (3, c["new_tokens"], 2)
    k, v = (torch.randn(*shape, dim).to(queries.q) for dim in (32, c["head_dim_v"]))
    if not c["rotary"]:
        return Call(queries, cache, options, NewTokens(k, v))
    angles = torch.randn(64, c["rotary_dim"] // 2)
    advance_q = c["mask"] in ("causal", "window", "causal_window")
    rotary = Rotary(angles.cos().to(k), angles.sin().to(k), c["rotary"] == "interleaved", advance_q)
    return Call(queries, cache, options, NewTokens(k, v, rotary, queries.q, torch.empty_like(queries.q)))


def flash_attn_arguments(call: Call, combination: Combination) -> dict[str, Any]:
    queries, cache, options, new = call
    causal, window = MASKS[combination["mask"]]
    rotary = None if new is None else new.rotary
    return {
        "q": queries.q,
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k": None if new is None else new.k,
        "v": None if new is None else new.v,
        "rotary_cos": None if rotary is None else rotary.cos,
        "rotary_sin": None if rotary is None else rotary.sin,
        "rotary_interleaved": rotary is None or rotary.interleaved,
        "cache_seqlens": 20 if combination["int_length"] else cache.cache_seqlens,
        "cache_batch_idx": cache.cache_batch_idx,
        "cache_leftpad": cache.cache_leftpad,
        "block_table": cache.block_table,
        "causal": causal,
        "window_size": window,
        "softcap": options.softcap,
        "alibi_slopes": options.alibi_slopes,
        "sinks": options.sinks,
        "num_splits": combination["num_splits"],
        "return_softmax_lse": combination["return_lse"],
    }


def same_contents(x: Tensor, y: Tensor) -> bool:
    """Equal bit by bit, the poison of unused slots (NaN) included."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


SAMPLE = covering_sample(seed=0) + covering_sample(seed=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_kvcache_is_an_append_then_attention(number: int, device: str) -> None:
    """Any combination gives what the reference gives, step by step; slots beside the new ones stay."""
    combination = SAMPLE[number]
    call = make_call(combination, device, seed=number)
    queries, cache, options, new = call
    ours = dataclasses.replace(cache, k=cache.k.clone(), v=cache.v.clone())
    result = flash_attn_with_kvcache(**flash_attn_arguments(call._replace(cache=ours), combination))
    out, lse = result if isinstance(result, tuple) else (result, None)
    assert (lse is not None) is combination["return_lse"]
    if new is not None:
        reference.append(new, cache)
        queries = queries if new.q_rotated is None else Queries(new.q_rotated)
    assert_same_cache(ours, cache, rotated=bool(combination["rotary"]))
    assert_close_to_reference(out, lse, queries, cache, options)


def assert_same_cache(ours: KVCache, expected: KVCache, *, rotated: bool) -> None:
    assert same_contents(ours.v, expected.v)
    if not rotated:
        assert same_contents(ours.k, expected.k)
        return
    assert torch.equal(ours.k.isnan(), expected.k.isnan())
    # Both sides round a cos - b sin to the dtype once, |.| <= |a| + |b|, from arithmetic that is finer.
    error, largest = (ours.k - expected.k).nan_to_num().abs().max(), expected.k.nan_to_num().abs().max()
    assert error <= 2 * largest * torch.finfo(ours.k.dtype).eps
