"""The planner: properties that hold for every problem on every GPU, without one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_decoding.errors import InvalidInput, Unsupported
from flash_decoding.plan import Hardware, explain, make_plan
from flash_decoding.plan.hardware import CPU
from flash_decoding.plan.splits import MAX_SPLITS, choose_num_splits, visible_tiles
from flash_decoding.plan.tiles import choose_tile, regime_of, residents, smem_bytes, tiles_for
from flash_decoding.plan.variants import VARIANTS
from flash_decoding.spec import Problem
from tests.plan_cases import GPUS, H200, problems


@given(problems(), GPUS, st.integers(0, 300))
def test_never_more_splits_than_tiles(problem: Problem, hardware: Hardware, num_splits: int) -> None:
    plan = make_plan(problem, hardware, num_splits=num_splits)
    assert 1 <= plan.num_splits <= visible_tiles(problem, plan.tile)
    if num_splits:
        assert plan.num_splits == min(num_splits, visible_tiles(problem, plan.tile))
    assert plan.kind == ("flash_decoding" if plan.num_splits > 1 else "flash_attention")


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 400), st.integers(1, 100))
def test_number_of_splits_is_monotone(programs: int, tiles: int, slots: int, more: int) -> None:
    splits = choose_num_splits(programs=programs, tiles=tiles, slots=slots)
    assert splits <= MAX_SPLITS
    assert choose_num_splits(programs=programs, tiles=tiles + more, slots=slots) >= splits
    assert choose_num_splits(programs=programs, tiles=tiles, slots=slots + more) >= splits
    assert choose_num_splits(programs=programs + more, tiles=tiles, slots=slots) <= splits


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 400))
def test_a_split_never_makes_more_programs_than_the_gpu_holds(programs: int, tiles: int, slots: int) -> None:
    splits = choose_num_splits(programs=programs, tiles=tiles, slots=slots)
    assert splits == 1 or splits * programs <= slots


@given(problems(), GPUS)
def test_tiles_fit_the_gpu(problem: Problem, hardware: Hardware) -> None:
    for tile in tiles_for(problem, hardware):
        assert smem_bytes(problem, tile) <= hardware.smem_bytes
        assert tile.block_n >= 16


@given(problems(), GPUS)
def test_crowded_tiles_differ_from_short_ones_in_stages_alone(problem: Problem, hardware: Hardware) -> None:
    """Batch-invariant calls take one or the other, as their batch has it: the bits must be the same."""
    crowded = choose_tile(problem, hardware, "crowded")
    short = choose_tile(problem, hardware, "short")
    assert crowded == dataclasses.replace(short, num_stages=crowded.num_stages)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_tiles_leave_no_room_for_a_second_program(head_dim: int) -> None:
    problem = Problem(8, 1, 32, 8, head_dim, head_dim, 65536, 2)
    tile = choose_tile(problem, H200, "long")
    assert residents(problem, tile, H200) == 1
    assert residents(problem, choose_tile(problem, H200, "shared"), H200) == 2


@pytest.mark.parametrize(
    ("batch", "kv_len", "regime"),
    [(512, 256, "crowded"), (128, 512, "shared"), (8, 8192, "long"), (8, 512, "short"), (1, 2**20, "long")],
)
def test_regimes(batch: int, kv_len: int, regime: str) -> None:
    """By programs for each of 132 multiprocessors, and by the keys of each program."""
    assert regime_of(Problem(batch, 1, 16, 2, 128, 128, kv_len, 2), H200) == regime


def test_even_splits_of_many_rows_are_short_and_runs_long() -> None:
    """As many bytes on their way as for few rows; a buffer more where programs go across sequences."""
    multi_query = make_plan(Problem(16, 1, 48, 1, 128, 128, 8192, 2), H200)
    drafts = make_plan(Problem(4, 8, 64, 8, 128, 128, 20000, 2), H200)
    assert (multi_query.balanced, multi_query.tile.num_stages) == (False, 3)
    assert (drafts.balanced, drafts.tile.num_stages) == (True, 4)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_rows_over_pages_have_two_programs_on_a_multiprocessor(head_dim: int) -> None:
    """One waits for addresses now and then: 264 programs for 132, of 10 tiles or more, or runs."""
    splits = make_plan(Problem(8, 8, 32, 8, head_dim, head_dim, 4096, 2, page_size=16), H200)
    short = make_plan(Problem(4, 8, 32, 8, head_dim, head_dim, 2048, 2, page_size=16), H200)
    multi_query = make_plan(Problem(16, 1, 48, 1, 128, 128, 8192, 2, page_size=16), H200)
    runs = make_plan(Problem(4, 4, 64, 8, 128, 128, 20000, 2, page_size=16), H200)
    plans = (splits, short, multi_query, runs)
    assert [plan.balanced for plan in plans] == [False, False, False, True]
    assert [plan.num_splits for plan in plans] == [4, 4, 8, 33]


ANNOUNCEMENT = [(256 >> i, 256 << i) for i in range(9)] + [(1, 131072)]


@pytest.mark.parametrize(("batch", "kv_len"), ANNOUNCEMENT)
def test_the_announcements_rows_fill_an_h200_once(batch: int, kv_len: int) -> None:
    """Flash-Decoding from 32 sequences down, FlashAttention above: enough programs, in one round."""
    problem = Problem(batch, 1, 16, 2, 128, 128, kv_len, 2)
    plan = make_plan(problem, H200)
    programs = batch * 2 * plan.num_splits
    assert plan.kind == ("flash_attention" if batch >= 64 else "flash_decoding")
    assert programs >= 0.9 * H200.sm_count
    assert plan.num_splits == 1 or programs <= H200.sm_count


def test_a_window_shortens_what_is_split() -> None:
    wide = make_plan(Problem(1, 1, 8, 1, 128, 128, 2**17, 2), H200)
    narrow = make_plan(Problem(1, 1, 8, 1, 128, 128, 2**17, 2, window_left=255), H200)
    assert narrow.num_splits <= 256 // narrow.tile.block_n + 1 < wide.num_splits


def test_dense_prefill_goes_to_sdpa_and_decoding_does_not() -> None:
    prefill = Problem(1, 4096, 32, 8, 128, 128, 4096, 2, dense=True, window_right=0, return_lse=False)
    assert make_plan(prefill, H200).variant == "sdpa"
    for other in (
        {"page_size": 16, "dense": False},
        {"return_lse": True},
        {"plain": False},
        {"kv_len": 8192},
    ):
        assert make_plan(Problem(**{**prefill.__dict__, **other}), H200).variant == "triton"
    assert make_plan(Problem(**{**prefill.__dict__, "q_len": 1}), H200).variant == "triton"
    assert make_plan(prefill, H200, batch_invariant=True).variant == "triton"
    assert make_plan(prefill, CPU).variant == "cpu"


def test_a_problem_that_nobody_runs_is_refused_with_every_reason() -> None:
    with pytest.raises(Unsupported) as refused:
        make_plan(Problem(1, 1, 8, 8, 512, 512, 1024, 2), H200)
    assert len(refused.value.reasons) == len(VARIANTS)
    assert "head_dim is above 256" in str(refused.value)
    old = Hardware("T4", "cuda", 40, 64 * 1024, (7, 5), 0.3e12)
    with pytest.raises(Unsupported, match=r"compute capability \(7, 5\)"):
        make_plan(Problem(1, 1, 8, 8, 128, 128, 1024, 2), old)


def test_hardware_by_name() -> None:
    assert Hardware.named("NVIDIA H200").sm_count == 132
    assert Hardware.named("a100").capability == (8, 0)
    with pytest.raises(InvalidInput, match="one of A100"):
        Hardware.named("TPU")


def test_explain_in_words() -> None:
    text = str(
        explain(batch=1, heads_q=16, heads_kv=2, head_dim=128, kv_len=65536, dtype="float16", gpu="H200")
    )
    for part in ("Flash-Decoding", "splits   66", "132 programs", "64.01 MiB", "4.80 TB/s", "H200"):
        assert part in text
    short = str(explain(batch=64, heads_q=32, heads_kv=8, head_dim=128, kv_len=512, gpu="A100"))
    assert "FlashAttention (no split)" in short
    sizes: dict[str, Any] = {"batch": 64, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "kv_len": 131072}
    invariant = str(explain(**sizes, batch_invariant=True, gpu="H200"))
    for part in (
        "64 (up to 2560 keys each, more of long sequences), 128 programs",
        "16 programs for each key/value head share all splits",
    ):
        assert part in invariant
    assert "16 (live keys shared evenly), 128 programs" in str(explain(**sizes, gpu="H200"))


@pytest.mark.parametrize(
    ("heads_q", "kv_len", "dtype", "message"),
    [
        (8, 0, "float16", "kv_len: got 0"),
        (3, 100, "float16", "multiple of heads_kv"),
        (8, 100, "int8", "dtype: got"),
    ],
)
def test_explain_refuses_sizes_that_no_call_has(heads_q: int, kv_len: int, dtype: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        explain(batch=1, heads_q=heads_q, heads_kv=2, head_dim=64, kv_len=kv_len, dtype=dtype, gpu="H100")
