"""What every test shares: the device, poisoned scratch memory, seeds, Triton interpreted where no GPU is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.interpreter import save_time

HAS_GPU = torch.cuda.is_available()

if HAS_GPU:
    # Without this, matrix products warn in the deterministic mode that poisons memory (below).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Triton decides when a kernel is decorated, so this stands before anything can import a kernel.
    os.environ["TRITON_INTERPRET"] = "1"
    save_time()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores among themselves; threads of PyTorch on top only make them wait for each other.
    torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "lazy_memory: torch.empty stays unwritten in this test (huge, mostly unused allocations)"
    )
    # Triton's interpreter says this for every load of a scalar, thousands of times; numpy<2.4 allows it.
    config.addinivalue_line(
        "filterwarnings", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        for item in items:  # so that -m gpu selects all that runs on it
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False (make gpu runs it)")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed the generators and poison uninitialised memory: NaN in floats, the largest value in integers.

    Scratch that nobody wrote then shows in the result, whoever allocated it and however (empty, empty_like,
    new_empty, empty_strided). PyTorch poisons only in its deterministic mode, hence that switch; it warns
    where an operator has no deterministic form, and goes on.
    """
    from flash_decoding import repeats  # not before Triton knows that it is the interpreter

    repeats.forget()  # what a test replaces on the way to a launch, a repeated call would go around
    torch.manual_seed(0)
    if request.node.get_closest_marker("lazy_memory") is not None:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
