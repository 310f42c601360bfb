"""What a column can run: reasons in words, made of small parts."""

from __future__ import annotations

import importlib.util

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


def first_of(*parts: WhyNot) -> WhyNot:
    """The first reason of several."""

    def why_not(case: Case) -> str | None:
        return next((reason for part in parts if (reason := part(case)) is not None), None)

    return why_not


dense_only = first_of(no_pages, equal_lengths)
"""The ``why_not`` of a column that attends to a whole tensor, or to an equal slice of each sequence."""
