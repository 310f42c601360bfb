"""The specification agrees with attention written in other ways, and every edge case is what is promised."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.spec import Options, Queries
from tests.cases import CASES
from tests.helpers import Case, Inputs, eager_attend, live_tokens, make_inputs, query_tokens

EXACT = 64 * torch.finfo(torch.float64).eps
"""Two float64 computations of values of order 1, in different orders, a few dozen roundings long."""


def scalar_attend(inputs: Inputs, b: int, token: int, head: int) -> tuple[list[float], float]:
    """One row by the definition, in Python floats: (out, lse)."""
    queries, cache, options = inputs
    q = query_tokens(queries, b)
    k, v, slots, length = live_tokens(cache, b)
    head_kv = head // (queries.heads // cache.heads)
    position = length - q.shape[0] + token
    total, out = 0.0, [0.0] * v.shape[-1]
    if options.sinks is not None:
        total = math.exp(options.sinks[head].item())
    for key, slot in enumerate(slots.tolist()):
        if options.window_left >= 0 and slot < position - options.window_left:
            continue
        if options.window_right >= 0 and slot > position + options.window_right:
            continue
        pairs = zip(q[token, head].tolist(), k[key, head_kv].tolist(), strict=True)
        score = options.softmax_scale * math.fsum(x * y for x, y in pairs)
        if options.softcap > 0:
            score = options.softcap * math.tanh(score / options.softcap)
        if options.alibi_slopes is not None:
            slopes = options.alibi_slopes if options.alibi_slopes.dim() == 1 else options.alibi_slopes[b]
            score -= slopes[head].item() * abs(position - slot)
        total += math.exp(score)
        out = [x + math.exp(score) * y for x, y in zip(out, v[key, head_kv].tolist(), strict=True)]
    if total == 0:
        return out, -math.inf
    return [x / total for x in out], math.log(total)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_row_is_the_definition(case: Case) -> None:
    inputs = make_inputs(case)
    out, lse = reference.attend(*inputs)
    first = 0
    for b in range(case.batch):
        q_len = query_tokens(inputs.queries, b).shape[0]
        for token, head in ((0, 0), (q_len // 2, 1), (q_len - 1, case.heads_q - 1)) if q_len else ():
            want_out, want_lse = scalar_attend(inputs, b, token, head)
            got_out = out[first + token, head] if case.q_lens else out[b, token, head]
            got_lse = lse[head, first + token] if case.q_lens else lse[b, head, token]
            assert got_out.tolist() == pytest.approx(want_out, rel=EXACT, abs=EXACT)
            assert got_lse.item() == pytest.approx(want_lse, rel=EXACT, abs=EXACT)
        first += q_len


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_rows_agree_with_eager_softmax(case: Case) -> None:
    inputs = make_inputs(case)
    got, want = reference.attend(*inputs), eager_attend(*inputs, torch.float64)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, theirs, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_sdpa(causal: bool) -> None:
    case = Case(heads_q=6, heads_kv=2, q_len=33, capacity=33, causal=causal, dtype=torch.float64)
    inputs = make_inputs(case)
    q, k, v = (x.transpose(1, 2) for x in (inputs.queries.q, inputs.cache.k, inputs.cache.v))
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(reference.attend(*inputs)[0], want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unused_slots_change_no_bit(case: Case) -> None:
    clean, poisoned = (reference.attend(*make_inputs(case, poison=poison)) for poison in (0.0, math.nan))
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))
    assert not clean[0].isnan().any()


@pytest.mark.parametrize(
    "case",
    [
        Case(name="no keys", seqlens=(0, 0)),
        Case(name="padding up to the end", seqlens=(5, 9), leftpad=(5, 30)),
        Case(name="causal, no key before the first queries", seqlens=(0, 0), q_len=3, causal=True),
        Case(name="the window is elsewhere", seqlens=(2, 2), q_len=40, window=(0, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(case: Case, sinks: bool) -> None:
    inputs = make_inputs(dataclasses.replace(case, sinks=sinks))
    out, lse = (x[:, 0] if x.shape[1] == case.q_len else x[..., 0] for x in reference.attend(*inputs))
    empty = inputs.options.sinks.double() if inputs.options.sinks is not None else torch.tensor(-math.inf)
    assert (out == 0).all()
    assert torch.equal(lse, empty.expand_as(lse).to(lse.dtype))


def test_one_key_is_its_value() -> None:
    inputs = make_inputs(Case(seqlens=(1, 1)))
    out, lse = reference.attend(*inputs)
    assert torch.equal(out[:, 0, ::2], inputs.cache.v[:, 0].double())
    scores = (inputs.queries.q[:, 0, ::2] * inputs.cache.k[:, 0]).double().sum(-1)
    assert torch.allclose(lse[:, ::2, 0], scores * inputs.options.softmax_scale, rtol=1e-6)


def partials(inputs: Inputs, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Attention between neighbouring cuts; the first partial has the sinks."""
    no_sinks = dataclasses.replace(inputs.options, sinks=None)
    pieces = [
        reference.attend(inputs.queries, inputs.cache, no_sinks if i else inputs.options, key_range=(lo, hi))
        for i, (lo, hi) in enumerate(itertools.pairwise(cuts))
    ]
    return torch.stack([out for out, _ in pieces]), torch.stack([lse for _, lse in pieces])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("page_size", [0, 5])
def test_partials_merge_to_the_whole_wherever_they_are_cut(sinks: bool, page_size: int) -> None:
    case = Case(
        capacity=20, seqlens=(0, 17), q_len=3, causal=True, window=(9, -1), alibi="heads", sinks=sinks
    )
    inputs = make_inputs(dataclasses.replace(case, page_size=page_size))
    out, lse = reference.attend(*inputs)
    for cuts in [[0, cut, 20] for cut in range(21)] + [list(range(21)), [0, 4, 4, 20, 20]]:
        merged_out, merged_lse = reference.merge(*partials(inputs, cuts))
        assert torch.allclose(merged_out, out, rtol=EXACT, atol=EXACT)
        assert torch.allclose(merged_lse, lse, rtol=EXACT, atol=EXACT)


def test_a_range_beyond_the_keys_is_empty() -> None:
    inputs = make_inputs(Case(seqlens=(5, 9)))
    out, lse = reference.attend(*inputs, key_range=(9, 64))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_empty_partials_do_not_count_whatever_they_hold() -> None:
    outs = torch.full((3, 1, 1, 2, 4), math.nan)
    lses = torch.full((3, 1, 2, 1), -math.inf)
    out, lse = reference.merge(outs, lses)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    outs[1, :, :, 0], lses[1, :, 0] = 7.0, 3.0
    out, lse = reference.merge(outs, lses)
    assert (out[:, :, 0] == 7).all()
    assert lse.flatten().tolist() == [3.0, -math.inf]


def test_ragged_is_dense_packed() -> None:
    queries, cache, options = make_inputs(Case(batch=3, q_len=4, seqlens=(9, 2, 64), causal=True))
    ragged = Queries(queries.q.flatten(0, 1), torch.tensor([0, 4, 8, 12], dtype=torch.int32), 4)
    out, lse = reference.attend(queries, cache, options)
    ragged_out, ragged_lse = reference.attend(ragged, cache, options)
    assert torch.equal(ragged_out, out.flatten(0, 1))
    assert torch.equal(ragged_lse, lse.transpose(0, 1).flatten(1))


def test_computes_and_returns_in_the_dtype_asked_for() -> None:
    inputs = make_inputs(Case(dtype=torch.bfloat16))
    assert {x.dtype for x in reference.attend(*inputs, dtype=torch.float32)} == {torch.float32}


def test_without_a_scale_it_is_the_root_of_head_dim() -> None:
    queries, cache, _ = make_inputs(Case(head_dim=16))
    default = reference.attend(queries, cache, Options.make(head_dim=16))
    stated = reference.attend(queries, cache, Options(softmax_scale=0.25))
    assert torch.equal(default[0], stated[0])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs_on_a_gpu(case: Case) -> None:
    here, there = (reference.attend(*make_inputs(case, device=device)) for device in ("cpu", "cuda"))
    assert all(torch.allclose(x, y.cpu(), rtol=EXACT, atol=EXACT) for x, y in zip(here, there, strict=True))
