"""Triton's interpreter without what it does for nothing, most of its time for kernels as small as here.

It looks through all of ``triton.language`` for what to replace at every call of a device function, though the
launch around it has replaced that already. And it computes every sum and product of integers again in 64 bits
to see whether it overflows, but says so in debug mode alone.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any


def save_time() -> None:
    """Leave that out; where this Triton has no such steps, or there is no Triton, nothing happens."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if prepare is not None and scope is not None:
        interpreter._patch_lang = functools.partial(_prepare, prepare, scope)
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow") and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _prepare(prepare: Any, scope: Any, fn: Any) -> Any:
    """What ``prepare(fn)`` returns, the changes to take back after a launch; none where all is ready."""
    return scope() if all(map(_is_ready, _languages(fn.__globals__))) else prepare(fn)


def _languages(names: dict[str, Any]) -> list[types.ModuleType]:
    """Modules of the language among the globals of a function."""
    import triton.language as tl

    return [value for value in names.values() if value is tl or value is tl.core]


def _is_ready(language: types.ModuleType) -> bool:
    """Whether it has been prepared: what stands in for a function of the language is not marked as one."""
    import triton.language as tl

    return not tl.core.is_builtin(language.load)
