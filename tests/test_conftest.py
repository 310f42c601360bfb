"""The set-up that other tests rely on really happens."""

from __future__ import annotations

import os

import pytest
import torch


def test_uninitialised_floats_are_nan() -> None:
    like = torch.zeros(5, dtype=torch.bfloat16)
    for scratch in (torch.empty(3, 4), torch.empty_like(like), like.new_empty(7)):
        assert scratch.isnan().all()


def test_uninitialised_integers_are_out_of_any_range() -> None:
    assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.lazy_memory
def test_memory_stays_lazy_on_request() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_gpu_tests_run_only_with_a_gpu() -> None:
    assert torch.cuda.is_available()


def test_kernels_are_interpreted_where_no_gpu_is() -> None:
    assert torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1"
