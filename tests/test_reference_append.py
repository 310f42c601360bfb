"""Appending by the specification: where tokens land, how they are rotated, what stays untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_decoding import reference
from flash_decoding.spec import KVCache, NewTokens, Rotary
from tests.helpers import Case, live_tokens, make_inputs


def rotary_of(
    positions: int, rotary_dim: int, *, interleaved: bool = False, advance_q: bool = True
) -> Rotary:
    """The usual table, in float64, so that rotation itself is all that rounds."""
    frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angles = torch.arange(positions).double()[:, None] * frequencies
    return Rotary(angles.cos(), angles.sin(), interleaved=interleaved, advance_q=advance_q)


def turned(x: Tensor, position: int, rotary: Rotary) -> Tensor:
    """Rotation as a product of complex numbers, of x (heads, head_dim) at one position."""
    rotary_dim = rotary.rotary_dim
    head, rest = x[..., :rotary_dim].double(), x[..., rotary_dim:].double()
    shape = (*head.shape[:-1], -1, 2) if rotary.interleaved else (*head.shape[:-1], 2, rotary_dim // 2)
    pairs = head.reshape(shape) if rotary.interleaved else head.reshape(shape).transpose(-1, -2)
    numbers = torch.view_as_complex(pairs.contiguous()) * torch.complex(
        rotary.cos[position], rotary.sin[position]
    )
    pairs = torch.view_as_real(numbers)
    pairs = pairs if rotary.interleaved else pairs.transpose(-1, -2)
    return torch.cat((pairs.flatten(-2), rest), dim=-1)


CASES = [
    Case(name="contiguous", dtype=torch.float64, seqlens=(0, 60), capacity=64),
    Case(name="rows by index", dtype=torch.float64, seqlens=(3, 17), batch_idx=True, layout="bhsd"),
    Case(name="paged", dtype=torch.float64, seqlens=(3, 17), page_size=5, new_tokens=4),
    Case(
        name="paged by index", dtype=torch.float64, seqlens=(0, 1), page_size=1, batch_idx=True, new_tokens=4
    ),
    Case(
        name="values differ", dtype=torch.float64, seqlens=(5, 6), head_dim_v=24, page_size=16, new_tokens=4
    ),
]


def appended(case: Case, rotary: Rotary | None = None) -> tuple[KVCache, KVCache, NewTokens]:
    """The cache before and after four more tokens, and those tokens."""
    inputs = make_inputs(case)
    before = inputs.cache
    new = NewTokens(
        torch.randn(case.batch, 4, case.heads_kv, case.head_dim, dtype=case.dtype),
        torch.randn(case.batch, 4, case.heads_kv, case.value_dim, dtype=case.dtype),
        rotary,
        torch.randn(case.batch, 4, case.heads_q, case.head_dim, dtype=case.dtype),
        torch.empty(case.batch, 4, case.heads_q, case.head_dim, dtype=case.dtype),
    )
    after = KVCache(
        before.k.clone(),
        before.v.clone(),
        before.cache_seqlens,
        before.block_table,
        before.cache_batch_idx,
        new_tokens=4,
    )
    reference.append(new, after)
    return before, after, new


@pytest.mark.parametrize("case", CASES, ids=str)
def test_new_tokens_follow_the_old_ones(case: Case) -> None:
    before, after, new = appended(case)
    for b, length in enumerate(case.lengths):
        k, v, _, total = live_tokens(after, b)
        assert total == length + 4
        assert torch.equal(k[length:], new.k[b])
        assert torch.equal(v[length:], new.v[b])
    for old, now, added in ((before.k, after.k, new.k), (before.v, after.v, new.v)):
        changed = (old != now) & ~(old.isnan() & now.isnan())
        assert int(changed.sum()) == added.numel(), "nothing else is written"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 32])
def test_keys_and_queries_turn_with_their_slot(case: Case, interleaved: bool, rotary_dim: int) -> None:
    rotary = rotary_of(64, rotary_dim, interleaved=interleaved)
    _, after, new = appended(case, rotary)
    assert new.q is not None
    assert new.q_rotated is not None
    for b, length in enumerate(case.lengths):
        keys = live_tokens(after, b)[0]
        for i in range(4):
            assert torch.allclose(
                keys[length + i], turned(new.k[b, i], length + i, rotary), rtol=0, atol=1e-14
            )
            want = turned(new.q[b, i], length + i, rotary)
            assert torch.allclose(new.q_rotated[b, i], want, rtol=0, atol=1e-14)


def test_queries_stay_at_the_first_position_unless_they_advance() -> None:
    rotary = rotary_of(64, 32, advance_q=False)
    _, _, new = appended(CASES[0], rotary)
    assert new.q is not None
    assert new.q_rotated is not None
    for b, length in enumerate(CASES[0].lengths):
        want = turned(new.q[b], length, rotary)
        assert torch.allclose(new.q_rotated[b], want, rtol=0, atol=1e-14)


def test_tokens_beyond_the_capacity_are_not_written() -> None:
    case = Case(dtype=torch.float64, seqlens=(62, 64))
    before, after, new = appended(case, rotary_of(64, 32))
    assert torch.equal(after.k[0, :62], before.k[0, :62])
    assert torch.equal(after.v[0, 62:], new.v[0, :2])
    assert torch.equal(after.k[1], before.k[1])
    assert torch.equal(after.v[1], before.v[1])


def test_rotation_is_rounded_once() -> None:
    rotary = rotary_of(64, 32)
    exact = torch.randn(5, 2, 32, dtype=torch.float64).bfloat16()
    positions = torch.arange(5)
    want = torch.stack([turned(x, i, rotary) for i, x in enumerate(exact)]).bfloat16()
    assert torch.equal(reference.rotate(exact, positions, rotary), want)
