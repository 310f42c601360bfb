"""What a column can run: reasons in words, made of small parts."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection

import torch

from flash_decoding.bench.cases import Case
from flash_decoding.bench.column import WhyNot


def cuda_only(case: Case) -> str | None:
    """The ``why_not`` of a column that needs a GPU."""
    return None if case.device.type == "cuda" else "CUDA only"


def no_pages(case: Case) -> str | None:
    """The ``why_not`` of a column that knows contiguous caches alone."""
    return f"takes no pages, here of {case.page_size}" if case.page_size else None


def equal_lengths(case: Case) -> str | None:
    """The ``why_not`` of a column that takes all keys of a tensor."""
    return "takes no lengths that differ" if len(set(case.live)) > 1 else None


def one_token(case: Case) -> str | None:
    """The ``why_not`` of a column with one query token per sequence."""
    return f"takes one query token per sequence, not {case.q_len}" if case.q_len > 1 else None


def no_window(case: Case) -> str | None:
    """The ``why_not`` of a column that attends to all live keys."""
    return f"takes no window, here of {case.window}" if case.window else None


def installed(package: str) -> WhyNot:
    """The ``why_not`` of a column that needs a package."""

    def why_not(case: Case) -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return why_not


def whole_pages(page_size: int) -> WhyNot:
    """The ``why_not`` of a column that sees a contiguous cache as pages."""

    def why_not(case: Case) -> str | None:
        fits = case.page_size or case.kv_len % page_size == 0
        return None if fits else f"length {case.kv_len} is not a multiple of {page_size}"

    return why_not


def half_precision(case: Case) -> str | None:
    """The ``why_not`` of a column whose kernels know two dtypes."""
    return "takes float16 and bfloat16" if case.dtype.itemsize != 2 else None


def group_in(groups: Collection[int]) -> WhyNot:
    """The ``why_not`` of a column that is compiled for some numbers of query heads per key/value head."""

    def why_not(case: Case) -> str | None:
        fits = case.group in groups
        return None if fits else f"knows no groups of {case.group} query heads per key/value head"

    return why_not


def pages_in(sizes: Collection[int]) -> WhyNot:
    """The ``why_not`` of a column that is compiled for some page sizes, of pages alone."""

    def why_not(case: Case) -> str | None:
        is_odd = case.page_size and case.page_size not in sizes
        return f"takes pages of {', '.join(map(str, sizes))}, not {case.page_size}" if is_odd else None

    return why_not


def capability_in(majors: Collection[int]) -> WhyNot:
    """The ``why_not`` of a column that is written for some generations of NVIDIA's GPUs."""

    def why_not(case: Case) -> str | None:
        major, minor = torch.cuda.get_device_capability(case.device)
        return None if major in majors else f"is not written for a GPU of capability {major}.{minor}"

    return why_not


def first_of(*parts: WhyNot) -> WhyNot:
    """The first reason of several."""

    def why_not(case: Case) -> str | None:
        return next((reason for part in parts if (reason := part(case)) is not None), None)

    return why_not


dense_only = first_of(no_pages, equal_lengths)
"""The ``why_not`` of a column that attends to a whole tensor, or to an equal slice of each sequence."""
