"""The append kernel and the merge, interpreted on a CPU or compiled on a GPU, against the reference."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from flash_decoding import reference
from flash_decoding.plan import Hardware
from flash_decoding.spec import KVCache, NewTokens, Rotary
from tests.helpers import Case, in_layout, make_inputs

pytest.importorskip("triton", reason="kernels need Triton; the CPU path does without")

APPENDS = (
    Case(name="contiguous", capacity=40, seqlens=(0, 17)),
    Case(name="paged", capacity=40, seqlens=(3, 17), page_size=8),
    Case(name="pages_of_1", capacity=40, seqlens=(3, 17), page_size=1),
    Case(name="pages_of_7", capacity=40, seqlens=(6, 13), page_size=7),
    Case(name="batch_idx", capacity=40, seqlens=(3, 17), batch_idx=True),
    Case(name="heads_first", capacity=40, seqlens=(3, 17), layout="bhsd"),
    Case(name="over_the_end", capacity=40, seqlens=(39, 40)),
    Case(name="half_precision", capacity=40, seqlens=(3, 17), dtype=torch.float16),
    Case(name="odd_sizes", capacity=40, seqlens=(3, 17), heads_q=9, heads_kv=3, head_dim=80, head_dim_v=24),
)


def new_tokens(case: Case, rotary_dim: int, interleaved: bool, device: torch.device) -> NewTokens:
    """Two new tokens for each sequence, and three query tokens."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    k = in_layout(randn(case.batch, 2, case.heads_kv, case.head_dim), case.layout)
    v = in_layout(randn(case.batch, 2, case.heads_kv, case.value_dim), case.layout)
    if not rotary_dim:
        return NewTokens(k, v)
    angles = torch.rand(case.slots, rotary_dim // 2, generator=generator).to(device) * 6
    q = in_layout(randn(case.batch, 3, case.heads_q, case.head_dim), case.layout)
    rotary = Rotary(
        angles.cos().to(case.dtype), angles.sin().to(case.dtype), interleaved, advance_q=not interleaved
    )
    return NewTokens(k, v, rotary, q, torch.empty_like(q))


@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", APPENDS, ids=str)
def test_append_writes_what_the_reference_writes(
    case: Case, interleaved: bool, rotary_dim: int, device: torch.device
) -> None:
    from flash_decoding.kernels import append

    # every slot needs a page of its own here, those behind the lengths too
    whole = Case(**{**case.__dict__, "seqlens": (case.slots,) * case.batch})
    base = make_inputs(whole, device=device).cache
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    caches = [
        KVCache(base.k.clone(), base.v.clone(), lengths, base.block_table, base.cache_batch_idx)
        for _ in range(2)
    ]
    new = [new_tokens(case, rotary_dim, interleaved, device) for _ in range(2)]
    reference.append(new[0], caches[0])
    append.launch(new[1], caches[1], overlaps=Hardware.of(device).overlaps_launches)
    # one rounding of the same fp32 value; its last bit may differ where products are fused
    ulp = torch.finfo(case.dtype).eps
    torch.testing.assert_close(caches[1].k, caches[0].k, rtol=ulp, atol=4 * ulp, equal_nan=True)
    assert torch.equal(caches[1].v.nan_to_num(9.0), caches[0].v.nan_to_num(9.0))
    if new[0].q_rotated is not None and new[1].q_rotated is not None:
        torch.testing.assert_close(new[1].q_rotated, new[0].q_rotated, rtol=ulp, atol=4 * ulp)


@pytest.mark.parametrize("splits", [1, 2, 31, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge(splits: int, dtype: torch.dtype, device: torch.device) -> None:
    from flash_decoding.kernels import merge

    generator = torch.Generator().manual_seed(splits)
    outs = torch.randn(splits, 2, 3, 4, 24, generator=generator).to(device, dtype)
    lses = (torch.randn(splits, 2, 4, 3, generator=generator) * 5).to(device)
    lses[:, 0, 0, 0] = -math.inf  # a row that nobody saw
    lses[0, 1] = -math.inf  # and a part that saw nothing, with rubbish as output
    outs[0, 1] = math.nan
    outs[:, 0, 0, 0] = math.nan
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    merge.launch(outs, lses, out=out, lse=lse)
    clean = outs.double().nan_to_num(0.0)
    weight = torch.exp(lses.double() - torch.logsumexp(lses.double(), 0)).nan_to_num(0.0)
    want = (weight.transpose(2, 3)[..., None] * clean).sum(0)
    # sums of at most `splits` terms in fp32, and one rounding to the dtype
    bound = splits * 2.0**-23 * float(clean.abs().max()) + torch.finfo(dtype).eps * float(want.abs().max())
    assert float((out.double() - want).abs().max()) <= bound
    want_lse = torch.logsumexp(lses.double(), 0)
    assert torch.equal(torch.isinf(lse), torch.isinf(want_lse))
    seen = ~torch.isinf(want_lse)
    assert float((lse.double() - want_lse)[seen].abs().max()) <= 16 * 2.0**-23 * float(
        want_lse[seen].abs().max()
    )
    assert (out[0, 0, 0] == 0).all()


def test_merge_of_copies(device: torch.device) -> None:
    """Copied deeply, inputs stay as they were: merging writes its outputs and nothing else."""
    from flash_decoding.kernels import merge

    outs, lses = torch.randn(3, 1, 1, 2, 16, device=device), torch.randn(3, 1, 2, 1, device=device)
    before = copy.deepcopy((outs, lses))
    merge.launch(outs, lses, out=torch.empty_like(outs[0]), lse=torch.empty_like(lses[0]))
    assert torch.equal(outs, before[0])
    assert torch.equal(lses, before[1])
