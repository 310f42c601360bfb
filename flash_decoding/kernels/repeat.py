"""Launches that are made again with other addresses.

Triton's own launch looks at every argument of every call, to find the kernel that was compiled for such
arguments: some 25 microseconds of the host's time. A caller who knows that nothing but addresses has changed
hands them to the compiled kernel itself.
"""

from __future__ import annotations

import functools
from typing import Any

from triton import knobs
from triton.runtime import driver

STREAM, METADATA, EXIT_HOOK, FIRST = 3, 6, 8, 9
"""Places of a launcher's arguments: grid (3), stream, function, packed metadata, then what hooks are told and
the two hooks, then the kernel's own. The same for every backend since Triton 3.4."""


class Repeat:
    """A launch that has been made, but for its addresses.

    All else is as it was, sizes and strides included, and so is what Triton compiled. It compiled for what
    it saw of the addresses too: who repeats a launch passes None where there was None, the same dtypes on
    the same device, which is the current one, and multiples of 16 where there were such.
    """

    __slots__ = ("_args", "_compiled", "_device", "_places", "_run")

    def __init__(self, compiled: Any, programs: int, args: list[Any], places: tuple[int, ...]) -> None:
        self._compiled, self._run = compiled, compiled.run
        self._device = driver.active.get_current_device()
        launch = (programs, 1, 1, None, compiled.function, compiled.packed_metadata, None, None, None)
        self._args, self._places = [*launch, *args], tuple(FIRST + place for place in places)

    def __call__(self, *addresses: int | None) -> None:
        """Launch on the current stream, with the kernel's ``*_ptr`` in their order."""
        args = self._args.copy()
        args[STREAM] = stream = driver.active.get_current_stream(self._device)
        for place, address in zip(self._places, addresses, strict=True):
            args[place] = address
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if _listens(enter) or _listens(leave):
            told = self._compiled.launch_metadata(tuple(args[:STREAM]), stream, *args[FIRST:])
            args[METADATA : EXIT_HOOK + 1] = told, enter, leave
        self._run(*args)


def _listens(hook: Any) -> bool:
    """Whether a hook does anything: Triton 3.4 has none or one, later versions a chain that may be empty."""
    return bool(getattr(hook, "calls", hook))


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
    return Repeat(compiled, programs, again, places)


@functools.cache
def _addresses(kernel: Any) -> tuple[int, ...]:
    """Which arguments of a kernel are addresses."""
    return tuple(place for place, name in enumerate(kernel.arg_names) if name.endswith("_ptr"))
