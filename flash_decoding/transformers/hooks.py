"""Places where Transformers guesses from a name what an implementation is, and how they are taught ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "knows_flash_decoding"
"""Attribute of a function of Transformers that has been replaced by one of ours."""


def teach(owner: Any, name: str, made: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function of Transformers by one that knows our name; calling it again does nothing.

    Args:
        owner: class or module that has the function.
        name: of the function.
        made: gives the new function for the old one, which it has to call for all names but ours.
    """
    known = getattr(owner, name)
    if hasattr(known, _MARK):
        return
    taught = functools.wraps(known)(made(known))
    setattr(taught, _MARK, True)
    setattr(owner, name, taught)
