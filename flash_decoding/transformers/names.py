"""What Transformers calls a cache among the arguments of a model: 5.24 gave it another name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

_OLD, _NEW = "past_key_values", "cache"
_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters

GENERATE = _NEW if _NEW in _PREPARED else _OLD
"""The name for ``generate``, whose own signature has none."""


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name for a forward. Those of Transformers take the old one for a while, with a warning each time.

    Args:
        forward: of a class of models; one that was written for the old name keeps it.
    """
    return _OLD if _OLD in inspect.signature(forward).parameters else GENERATE
