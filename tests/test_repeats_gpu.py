"""Repeated calls where they launch: other tensors, streams, graphs; the same bits as first calls."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_decoding as fd
from flash_decoding import repeats
from tests.repeat_cases import given, variants

pytestmark = pytest.mark.gpu


def attend(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    result = fd.decode_attention(**arguments)
    return (result,) if isinstance(result, Tensor) else result


def first(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """A call that is made as if there had been none."""
    repeats.forget()
    return attend(arguments)


def assert_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], what: str = "") -> None:
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs, strict=True):
        assert not a.isnan().any(), what
        assert torch.equal(a, b), what


def test_calls_after_others_like_them_give_the_bits_of_first_ones() -> None:
    for name, arguments in variants("cuda"):
        repeats.forget()
        attend(given("cuda"))
        after, again = attend(arguments), attend(arguments)
        expected = first(arguments)
        assert_same(after, expected, name)
        assert_same(again, expected, name)


def test_a_call_of_a_kind_reads_its_own_tensors() -> None:
    attend(given("cuda"))
    kinds = len(repeats._kept)
    assert kinds > 0
    others = [given("cuda") for _ in range(3)]
    results = [attend(arguments) for arguments in others]
    assert len(repeats._kept) == kinds
    for arguments, result in zip(others, results, strict=True):
        assert_same(result, first(arguments))


def test_a_repetition_launches_on_the_stream_that_is_current() -> None:
    later = given("cuda")
    expected = first(later)
    q = torch.zeros_like(later["q"])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # On any other stream the call would see zeros.
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        q.copy_(later["q"])
        result = attend(later | {"q": q})
    stream.synchronize()
    assert_same(result, expected)


def test_a_repetition_can_be_captured_and_replayed_with_other_contents() -> None:
    arguments, later = given("cuda"), given("cuda")
    expected = first(later)
    attend(arguments)
    kinds = len(repeats._kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = attend(arguments)
    assert len(repeats._kept) == kinds
    for name, x in arguments.items():
        x.copy_(later[name])
    graph.replay()
    assert_same(result, expected)


def test_a_call_first_made_in_a_capture_is_repeated_outside() -> None:
    arguments = given("cuda")
    expected = first(arguments)
    repeats.forget()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(arguments)
    assert_same(attend(arguments), expected)
    graph.replay()
    assert_same(captured, expected)


def test_every_gpu_repeats_its_own() -> None:
    for index in range(torch.cuda.device_count()):
        arguments = {name: x.to(f"cuda:{index}") for name, x in given("cuda").items()}
        expected = first(arguments)
        assert_same(attend(arguments), expected)
        with torch.cuda.device(index):
            assert_same(attend(arguments), expected)
            assert_same(attend(arguments), expected)


def test_grad_is_refused_after_calls_without_it() -> None:
    arguments = given("cuda")
    with torch.no_grad():
        attend(arguments | {"q": arguments["q"].requires_grad_()})
        attend(arguments)
    with pytest.raises(fd.Unsupported):
        attend(arguments)


def test_what_is_refused_is_refused_after_a_call_like_it() -> None:
    arguments = given("cuda")
    attend(arguments | {"num_splits": 2})
    for wrong in (2.0, [2], torch.tensor(2)):
        with pytest.raises(fd.InvalidInput):
            attend(arguments | {"num_splits": wrong})


def test_a_profiler_sees_the_operator_of_a_repeated_call() -> None:
    arguments = given("cuda")
    attend(arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(arguments)
    assert "flash_decoding::attention" in {event.key for event in profile.key_averages()}


def test_a_compiled_call_and_an_eager_one_share_nothing_but_the_result() -> None:
    arguments = given("cuda")
    expected = first(arguments)
    attend(arguments)
    compiled = torch.compile(fd.decode_attention, fullgraph=True)
    for _ in range(3):
        out = compiled(**arguments)
        assert isinstance(out, Tensor)
        assert_same((out,), expected)


def test_a_repeated_append_writes_and_counts_its_version() -> None:
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    for _ in range(3):
        k = torch.randn(2, 1, 2, 64, device="cuda", dtype=torch.float16)
        caches = [torch.zeros(2, 16, 2, 64, device="cuda", dtype=torch.float16) for _ in range(2)]
        before = [cache._version for cache in caches]
        fd.append_kv(k, 2 * k, *caches, cache_seqlens=lengths)
        assert torch.equal(caches[0][:, :1], k)
        assert torch.equal(caches[1][:, :1], 2 * k)
        assert all(cache._version > old for cache, old in zip(caches, before, strict=True))


@pytest.mark.parametrize("lse", [False, True])
def test_what_was_kept_holds_no_memory(lse: bool) -> None:
    arguments = given("cuda", return_lse=lse)
    attend(arguments)
    repeats.forget()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        attend(arguments)
    assert repeats._kept
    assert torch.cuda.memory_allocated() == before


def test_results_of_a_kind_first_met_in_inference_mode_are_no_inference_tensors() -> None:
    arguments = given("cuda")
    with torch.inference_mode():
        attend(arguments)
    kinds = len(repeats._kept)
    with torch.no_grad():
        (out,) = attend(arguments)
    assert len(repeats._kept) == kinds
    assert not out.is_inference()


def test_a_repetition_goes_past_the_python_of_the_launcher() -> None:
    from flash_decoding.kernels.repeat import Chain

    for _ in range(2):
        attend(given("cuda"))
    (steps,) = repeats._kept.values()
    assert isinstance(steps, repeats.AttentionSteps)
    assert isinstance(steps.launches, Chain)
    links, settled = steps.launches._links, steps.launches._settled
    assert settled is not None
    ends = [launch.args[0] if isinstance(launch, functools.partial) else launch for launch, _, _ in settled]
    assert ends == [link.compiled.run.launch for link, _ in links]
    assert len(settled) == 2


@pytest.mark.lazy_memory
@pytest.mark.parametrize("lse", [False, True])
def test_repetitions_in_memory_that_nobody_filled_give_the_same_bits(lse: bool) -> None:
    arguments = given("cuda", return_lse=lse)
    expected = first(arguments)
    for _ in range(3):
        assert_same(attend(arguments), expected)


def test_arguments_are_looked_at_anew_where_a_tensor_was_changed_in_place() -> None:
    arguments = given("cuda")
    attend(arguments)
    arguments["q"].resize_(1, *arguments["q"].shape[1:])
    with pytest.raises(fd.InvalidInput):
        attend(arguments)
    arguments["cache_seqlens"].resize_(1)
    assert attend(arguments)[0].shape == arguments["q"].shape
