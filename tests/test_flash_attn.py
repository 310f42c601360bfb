"""flash-attn's functions: its signatures, its results, and what is refused."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import InvalidInput, flash_attn, ops
from flash_decoding.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_decoding.spec import KVCache, Queries
from tests.helpers import Case, assert_close_to_reference, make_inputs
from tests.refusals import Arguments, floats, ints

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "flash_attn_with_kvcache": [
        *[(name, "required") for name in ("q", "k_cache", "v_cache")],
        *[(name, None) for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")],
        *[(name, None) for name in ("cache_batch_idx", "cache_leftpad", "block_table", "softmax_scale")],
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("rotary_interleaved", True),
        ("alibi_slopes", None),
        ("num_splits", 0),
        ("return_softmax_lse", False),
    ],
    "flash_attn_func": [
        *[(name, "required") for name in ("q", "k", "v")],
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("alibi_slopes", None),
        ("deterministic", False),
        ("return_attn_probs", False),
    ],
    "flash_attn_varlen_func": [
        *[(name, "required") for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")],
        *[(name, "required") for name in ("max_seqlen_q", "max_seqlen_k")],
        ("dropout_p", 0.0),
        ("softmax_scale", None),
        ("causal", False),
        ("window_size", (-1, -1)),
        ("softcap", 0.0),
        ("alibi_slopes", None),
        ("deterministic", False),
        ("return_attn_probs", False),
        ("block_table", None),
    ],
}
"""Names, order and defaults of flash-attn 2.8's parameters."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_flash_attn(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    positional = [
        (p.name, "required" if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    ours = {p.name: p.default for p in parameters if p.kind is not p.POSITIONAL_OR_KEYWORD}
    assert positional == SIGNATURES[name]
    assert ours == {"sinks": None}


DENSE_CASES = [
    Case(name="prompt", q_len=40, capacity=40, causal=True),
    Case(name="more_queries_than_keys", q_len=9, capacity=5, causal=True),
    Case(name="bidirectional", q_len=7, capacity=30, dtype=torch.bfloat16),
    Case(name="options", q_len=7, capacity=30, window=(5, 3), softcap=3.0, alibi="batch", sinks=True),
    Case(name="one_key", q_len=3, capacity=1, seqlens=(1, 1), head_dim_v=16),
    Case(name="heads_first", q_len=4, capacity=20, layout="bhsd", causal=True, heads_kv=1),
]


def score_arguments(case: Case, options: Any) -> Arguments:
    """The arguments that all of flash-attn's functions share."""
    return {
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "alibi_slopes": options.alibi_slopes,
        "sinks": options.sinks,
        "return_attn_probs": True,
        "deterministic": True,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_dense(case: Case, device: str) -> None:
    queries, cache, options = make_inputs(case, device=device)
    out, lse, pattern = flash_attn_func(queries.q, cache.k, cache.v, **score_arguments(case, options))
    assert_close_to_reference(out, lse, queries, cache, options)
    assert pattern.shape == (0,)
    plain = flash_attn_func(queries.q, cache.k, cache.v, causal=True)
    assert isinstance(plain, Tensor)
    causal = make_inputs(Case(causal=True)).options
    assert_close_to_reference(plain, None, queries, cache, causal)


VARLEN_CASES = [
    Case(name="packed", batch=3, q_lens=(2, 5, 1), seqlens=(9, 5, 30), packed=True, causal=True),
    Case(name="empty_keys", batch=3, q_lens=(2, 3, 1), seqlens=(9, 0, 4), packed=True, causal=True),
    Case(name="empty_queries", batch=3, q_lens=(2, 0, 1), seqlens=(9, 7, 4), packed=True),
    Case(name="options", q_lens=(4, 3), seqlens=(9, 7), packed=True, window=(2, 1), softcap=2.0, sinks=True),
    Case(name="slopes", q_lens=(4, 3), seqlens=(9, 7), packed=True, alibi="batch", dtype=torch.bfloat16),
    Case(
        name="paged", batch=3, q_lens=(2, 5, 1), seqlens=(9, 0, 30), page_size=4, causal=True, alibi="heads"
    ),
    Case(name="single_pages", q_lens=(1, 3), seqlens=(9, 3), page_size=1, head_dim_v=24),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", VARLEN_CASES, ids=str)
def test_varlen(case: Case, device: str) -> None:
    queries, cache, options = make_inputs(case, device=device)
    ends = cache.cache_seqlens if case.packed else cache.cache_seqlens.cumsum(0, dtype=torch.int32)
    keys: Arguments = {"k": cache.k[0], "v": cache.v[0]} if case.packed else {"k": cache.k, "v": cache.v}
    assert queries.cu_seqlens_q is not None
    out, lse, pattern = flash_attn_varlen_func(
        queries.q,
        **keys,
        cu_seqlens_q=queries.cu_seqlens_q,
        cu_seqlens_k=torch.cat((ends.new_zeros(1), ends)),
        max_seqlen_q=queries.max_q_len,
        max_seqlen_k=max(case.lengths),
        block_table=cache.block_table,
        **score_arguments(case, options),
    )
    assert_close_to_reference(out, lse, queries, cache, options)
    assert pattern.shape == (0,)


def test_no_keys_at_all() -> None:
    """Zero keys are a sequence like any other: output 0, LSE -inf."""
    out, lse, _ = flash_attn_func(
        floats(2, 3, 4, 16), floats(2, 0, 2, 16), floats(2, 0, 2, 16), return_attn_probs=True
    )
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()
    keys = floats(0, 2, 16)
    out, lse, _ = flash_attn_varlen_func(
        floats(3, 4, 16), keys, keys, ints(0, 1, 3), ints(0, 0, 0), 2, 0, return_attn_probs=True
    )
    assert out.count_nonzero() == 0
    assert (lse == -math.inf).all()


def test_only_what_fills_its_cache_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner may hand dense keys to kernels that know no lengths; without a length given, all count."""
    seen: list[KVCache] = []

    def attention(queries: Queries, cache: KVCache, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        seen.append(cache)
        return queries.q, queries.q

    monkeypatch.setattr(ops, "attention", attention)
    q, k, lengths = floats(2, 1, 4, 16), floats(2, 8, 2, 16), ints(8, 8)
    flash_attn_func(q, k, k)
    fd.decode_attention(q, k, k)
    flash_attn_with_kvcache(q, k, k)
    flash_attn_with_kvcache(q, k, k, cache_seqlens=lengths)
    fd.decode_attention(q, k, k, cache_seqlens=7)
    flash_attn_varlen_func(q[:, 0], k[0], k[0], ints(0, 1, 2), ints(0, 4, 8), 1, 4)
    assert [cache.dense for cache in seen] == [True, True, True, False, False, False]
    for cache in seen[:3]:
        assert torch.equal(cache.cache_seqlens, lengths)


@pytest.mark.parametrize(("window", "causal"), [((8, 8), False), ((-1, -1), True), ((3, -1), False)])
def test_queries_advance_unless_everything_is_visible(window: tuple[int, int], causal: bool) -> None:
    """As in flash-attn: a window as wide as the cache hides nothing and counts as none."""
    turned = {
        advance: fd.append_kv(**rotation_arguments(), advance_q=advance, rotary_interleaved=True)
        for advance in (False, True)
    }
    advances = causal or window != (8, 8)
    arguments = rotation_arguments() | {"causal": causal, "window_size": window}
    ours = flash_attn_with_kvcache(**arguments)
    plain = {name: arguments[name] for name in ("k_cache", "v_cache", "causal", "window_size")}
    for advance, q in turned.items():
        assert q is not None
        expected = flash_attn_with_kvcache(q, **plain, cache_seqlens=ints(5, 8))
        assert isinstance(ours, Tensor)
        assert isinstance(expected, Tensor)
        assert torch.equal(ours, expected) is (advance == advances)


def rotation_arguments() -> Arguments:
    """Two sequences of a cache of 8 slots, two new tokens each, rotated."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{"q": (2, 2, 4, 16), "k": (2, 2, 2, 16), "v": (2, 2, 2, 16)},
        **{"k_cache": (2, 8, 2, 16), "v_cache": (2, 8, 2, 16), "rotary_cos": (8, 4), "rotary_sin": (8, 4)},
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"cache_seqlens": ints(3, 6)}


def test_arguments_without_a_contiguous_last_dimension_are_copied_but_caches_are_not() -> None:
    """As in flash-attn; a cache has to be as it is, since it may be written to."""
    arguments = rotation_arguments()
    arguments["cache_batch_idx"] = ints(1, 0)
    expected = flash_attn_with_kvcache(**{name: x.clone() for name, x in arguments.items()})
    strided = arguments | {name: x.mT.contiguous().mT for name, x in arguments.items() if name in "qkv"}
    strided["cache_batch_idx"] = ints(1, 9, 0, 9)[::2]
    ours = flash_attn_with_kvcache(**strided)
    assert isinstance(ours, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(ours, expected)
    q, k, v = (strided[name] for name in "qkv")
    dense = flash_attn_func(q, k, v, return_attn_probs=True)
    contiguous = flash_attn_func(arguments["q"], arguments["k"], arguments["v"], return_attn_probs=True)
    assert torch.equal(dense[0], contiguous[0])
    assert torch.equal(dense[1], contiguous[1])
    with pytest.raises(InvalidInput, match=r"k_cache: got strides .* wanted a contiguous last dimension"):
        flash_attn_with_kvcache(**(arguments | {"k_cache": arguments["k_cache"].mT.contiguous().mT}))
