"""Launches that are made again with other addresses.

Triton's own launch looks at every argument of every call, to find the kernel that was compiled for such
arguments: some 25 microseconds of the host's time. A caller who knows that nothing but addresses has changed
hands them to the compiled kernel itself, which Triton offers for this (``CompiledKernel[grid](*args)``).
"""

from __future__ import annotations

import functools
from typing import Any


class Repeat:
    """A launch that has been made, but for its addresses.

    All else is as it was, sizes and strides included, and so is what Triton compiled. It compiled for what
    it saw of the addresses too: who repeats a launch passes None where there was None, the same dtypes on
    the same device, and multiples of 16 where there were such.
    """

    __slots__ = ("_args", "_places", "_run")

    def __init__(self, run: Any, args: list[Any], places: tuple[int, ...]) -> None:
        self._run, self._args, self._places = run, args, places

    def __call__(self, *addresses: int | None) -> None:
        """Launch on the current stream of the current device, with the kernel's ``*_ptr`` in their order."""
        args = self._args.copy()
        for place, address in zip(self._places, addresses, strict=True):
            args[place] = address
        self._run(*args)


def launch(kernel: Any, programs: int, args: tuple[object, ...], constants: dict[str, Any]) -> Repeat | None:
    """Launch a kernel the way Triton does, and keep what it takes to do so again.

    Args:
        kernel: a kernel of Triton that takes ``args`` first, then its compile-time arguments.
        programs: size of the grid, of one dimension.
        args: in the kernel's order; tensors, or None, for all that are named ``*_ptr``.
        constants: compile-time arguments, and options of the compiler.

    Returns:
        The launch without its addresses; None from Triton's interpreter, which compiles nothing.
    """
    compiled = kernel[(programs,)](*args, **constants)
    if compiled is None:
        return None
    places = _addresses(kernel)
    again = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
    for place in places:
        again[place] = None  # a tensor kept here would never be freed
    return Repeat(compiled[(programs, 1, 1)], again, places)


@functools.cache
def _addresses(kernel: Any) -> tuple[int, ...]:
    """Which arguments of a kernel are addresses."""
    return tuple(place for place, name in enumerate(kernel.arg_names) if name.endswith("_ptr"))
