"""Fixed splits shared across sequences: the same bits as where each of them has a program of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flash_decoding import execute
from flash_decoding.plan.fixed import FixedSizes, most_splits
from flash_decoding.plan.splits import visible_tiles
from flash_decoding.spec import Plan
from tests.helpers import Case, Inputs, assert_close_to_reference, make_inputs
from tests.kernel_cases import EDGES, plan_of, random_case, runnable

ON_GPU = torch.cuda.is_available()
SWEEP = range(80) if ON_GPU else range(12)
LENGTHS = (300, 1, 0, 17, 64, 0)

RAGGED_LENGTHS = Case(batch=6, capacity=320, seqlens=LENGTHS)
FEATURES = (
    Case(name="plain", batch=6, capacity=320, seqlens=LENGTHS, dtype=torch.float16),
    Case(name="window", batch=4, capacity=320, seqlens=(320, 90, 0, 300), window=(150, 0), q_len=3),
    Case(name="both sides", batch=3, capacity=320, seqlens=(320, 9, 170), window=(99, 1), q_len=6),
    Case(name="leftpad", batch=4, capacity=320, seqlens=(320, 90, 200, 3), leftpad=(150, 89, 0, 3)),
    Case(name="pages", batch=4, capacity=320, seqlens=(320, 16, 0, 255), page_size=16, dtype=torch.float16),
    Case(name="small pages", batch=3, capacity=320, seqlens=(320, 2, 211), page_size=3, batch_idx=True),
    Case(name="tokens", batch=4, q_len=4, causal=True, capacity=320, seqlens=(320, 2, 0, 200), sinks=True),
    Case(name="row tiles", batch=3, q_len=20, causal=True, window=(40, 0), capacity=320, seqlens=(310, 9, 7)),
    Case(name="ragged", batch=4, q_lens=(1, 0, 30, 9), causal=True, capacity=320, seqlens=(320, 7, 0, 160)),
    Case(name="packed", batch=3, q_lens=(4, 0, 6), packed=True, causal=True, seqlens=(100, 70, 400)),
    Case(name="sinks", batch=3, sinks=True, capacity=320, seqlens=(0, 320, 40), dtype=torch.float16),
    Case(name="holes", batch=3, key_mask="far", capacity=320, seqlens=(280, 250, 20), softcap=5.0),
    Case(name="alibi", batch=3, alibi="batch", capacity=320, seqlens=(320, 1, 111), new_tokens=2),
)  # fmt: skip


def small_splits(
    inputs: Inputs, *, runs: int = 0, tiles: int = 2, leaf: int = 1, by_leaf: bool = False
) -> Plan:
    """A batch-invariant plan with splits and leaves of a few tiles, for short sequences to have many."""
    plan = plan_of(inputs, batch_invariant=True, runs=runs)
    problem = execute.problem_of(*inputs, return_lse=True)
    block_n = plan.tile.block_n
    sizes = FixedSizes(tiles * block_n, 0, 0, leaf_tokens=leaf * block_n)
    splits = most_splits(visible_tiles(problem, plan.tile), sizes, plan.tile)
    return dataclasses.replace(
        plan,
        num_splits=splits * tiles if by_leaf else splits,
        by_leaf=by_leaf,
        **sizes._asdict(),
    )


def alone(inputs: Inputs, b: int) -> Inputs:
    """Sequence ``b`` without its neighbours, its keys and its mask where they lie."""
    queries, cache, options = inputs
    one = slice(b, b + 1)
    row = torch.tensor([b], dtype=torch.int32, device=queries.q.device)
    cache = dataclasses.replace(
        cache,
        cache_seqlens=cache.cache_seqlens[one],
        cache_batch_idx=row if cache.cache_batch_idx is None else cache.cache_batch_idx[one],
        cache_leftpad=None if cache.cache_leftpad is None else cache.cache_leftpad[one],
        key_mask=None if cache.key_mask is None else cache.key_mask[one],
    )
    if options.alibi_slopes is not None and options.alibi_slopes.dim() == 2:
        options = dataclasses.replace(options, alibi_slopes=options.alibi_slopes[one])
    if queries.cu_seqlens_q is None:
        return Inputs(dataclasses.replace(queries, q=queries.q[one]), cache, options)
    start, stop = queries.cu_seqlens_q[b : b + 2].tolist()
    offsets = torch.tensor([0, stop - start], dtype=torch.int32, device=row.device)
    return Inputs(dataclasses.replace(queries, q=queries.q[start:stop], cu_seqlens_q=offsets), cache, options)


def results_of(inputs: Inputs, b: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What of the results is sequence ``b``'s."""
    offsets = inputs.queries.cu_seqlens_q
    if offsets is None:
        return out[b : b + 1], lse[b : b + 1]
    start, stop = offsets[b : b + 2].tolist()
    return out[start:stop], lse[:, start:stop]


def assert_same_bits(case: Case, device: torch.device, runs: int, tiles: int = 2) -> None:
    inputs = make_inputs(runnable(case, device), device=device)
    shared = small_splits(inputs, runs=runs, tiles=tiles)
    out, lse = execute.run_kernels(*inputs, shared)
    assert_close_to_reference(out, lse, *inputs)
    each = execute.run_kernels(*inputs, dataclasses.replace(shared, runs=0))
    assert torch.equal(out, each[0])
    assert torch.equal(lse, each[1])


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_a_sequence_alone_has_the_bits_that_it_has_in_a_batch(case: Case, device: torch.device) -> None:
    """Alone each split has a program; in the batch 5 programs share all of them."""
    inputs = make_inputs(case, device=device)
    plan = small_splits(inputs, runs=5, tiles=1)
    assert plan.num_splits > 1
    together = out, lse = execute.run_kernels(*inputs, plan)
    assert_close_to_reference(out, lse, *inputs)
    for b in range(case.batch):
        single = alone(inputs, b)
        if single.queries.q.numel() == 0:
            continue
        out, lse = execute.run_kernels(*single, small_splits(single, tiles=1))
        out_of_batch, lse_of_batch = results_of(inputs, b, *together)
        assert torch.equal(out, out_of_batch)
        assert torch.equal(lse, lse_of_batch)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(case: Case, device: torch.device) -> None:
    assert_same_bits(case, device, 3, tiles=1)


@pytest.mark.parametrize("runs", [*range(1, 9), 40])
def test_every_number_of_runs(runs: int, device: torch.device) -> None:
    """From one run over all sequences to more runs than there are splits."""
    assert_same_bits(RAGGED_LENGTHS, device, runs, tiles=1)


@pytest.mark.parametrize("seed", SWEEP)
def test_random_sweep(seed: int, device: torch.device) -> None:
    dims = (16, 64, 80, 128, 256) if ON_GPU else (16, 40, 64)
    case = random_case(2000 + seed, longest=2000 if ON_GPU else 150, head_dims=dims)
    assert_same_bits(case, device, (2, 3, 11)[seed % 3], tiles=1 + seed % 2)


def test_more_sequences_than_are_looked_at_together(device: torch.device) -> None:
    lengths = tuple((7 * i) % 80 for i in range(130))
    assert_same_bits(Case(batch=130, heads_q=2, heads_kv=1, capacity=80, seqlens=lengths), device, 9, tiles=1)


def test_packed_keys_that_begin_inside_a_tile_are_all_read(device: torch.device) -> None:
    """1024 keys from slot 5 on reach into a second split, in the planner's own plan."""
    case = Case(batch=2, q_lens=(1, 1), packed=True, seqlens=(5, 1024), heads_q=2, heads_kv=1, head_dim=16)
    inputs = make_inputs(case, device=device)
    out, lse = execute.run_kernels(*inputs, plan_of(inputs, batch_invariant=True))
    assert_close_to_reference(out, lse, *inputs)


@pytest.mark.parametrize("sinks", [False, True])
def test_no_keys_at_all(sinks: bool, device: torch.device) -> None:
    assert_same_bits(Case(batch=3, capacity=320, seqlens=(0, 0, 0), sinks=sinks), device, 4)


@pytest.mark.parametrize("page_size", [0, 16])
def test_dead_slots_change_no_bit(page_size: int, device: torch.device) -> None:
    case = Case(batch=3, capacity=320, seqlens=(300, 17, 0), leftpad=(3, 0, 0), page_size=page_size, q_len=2)
    outs = []
    for filling in (0.0, float("nan")):
        inputs = make_inputs(case, device=device, poison=filling)
        outs.append(execute.run_kernels(*inputs, small_splits(inputs, runs=4)))
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_one_plan_serves_all_lengths(device: torch.device) -> None:
    """Lengths change on the device while plan, grid and scratch stay: nothing depends on them."""
    inputs = make_inputs(RAGGED_LENGTHS, device=device)
    queries, cache, options = inputs
    plan = small_splits(inputs, runs=5)
    cache.k.nan_to_num_(0.0)
    cache.v.nan_to_num_(0.0)
    for lengths in ((0, 0, 0, 0, 0, 0), (320, 320, 320, 320, 320, 320), (1, 320, 2, 0, 63, 64)):
        cache.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out, lse = execute.run_kernels(queries, cache, options, plan)
        assert_close_to_reference(out, lse, *inputs)


def test_lengths_beyond_what_was_promised_write_no_scratch_of_others(device: torch.device) -> None:
    """Splits for 64 keys each, lengths of 300: the other sequences keep their bits."""
    inputs = make_inputs(Case(batch=3, capacity=320, seqlens=(300, 60, 33)), device=device)
    queries, cache, options = inputs
    plan = dataclasses.replace(small_splits(inputs, runs=3, tiles=1), num_splits=2)
    out, lse = execute.run_kernels(queries, cache, options, plan)
    for b in (1, 2):
        want, want_lse = execute.run_kernels(*alone(inputs, b), plan)
        assert torch.equal(out[b : b + 1], want)
        assert torch.equal(lse[b : b + 1], want_lse)
