"""Triton's interpreter without what it does for nothing, most of its time for kernels as small as here.

It looks through all of ``triton.language`` for what to replace at every call of a device function, though the
launch around it has replaced that already. And it computes every sum and product of integers again in 64 bits
to see whether it overflows, but says so in debug mode alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def save_time() -> None:
    """Leave that out; where this Triton has no such steps, or there is no Triton, nothing happens."""
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare: Any = getattr(interpreter, "_patch_lang", None)
    scope: Any = getattr(interpreter, "_LangPatchScope", None)

    def prepare_once(fn: Any) -> Any:
        """Changes to take back after a launch: none where what ``fn`` sees of the language is replaced."""
        seen = [value for value in fn.__globals__.values() if value is language or value is language.core]
        is_ready = seen and not any(language.core.is_builtin(module.load) for module in seen)
        return scope() if is_ready else prepare(fn)

    if prepare is not None and scope is not None:
        interpreter._patch_lang = prepare_once
    options = interpreter.interpreter_builder.options
    if hasattr(options, "sanitize_overflow") and not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
