"""Launches that are made again with other addresses.

Triton's own launch looks at every argument of every call, to find the kernel that was compiled for such
arguments: some 25 microseconds of the host's time. A caller who knows that nothing but addresses has changed
hands them to the compiled kernel itself; or to what its launcher calls in turn, where that can be told.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs
from triton.runtime import driver

STREAM, METADATA, EXIT_HOOK, FIRST = 3, 6, 8, 9
"""Places of a launcher's arguments: grid (3), stream, function, packed metadata, then what hooks are told and
the two hooks, then the kernel's own. The same for every backend since Triton 3.4."""

BLANK = 1 << 62
"""This number and those above it stand for what changes from call to call: the stream, then the addresses.
No size, stride or handle is as large."""

SCRATCH = ("global_scratch_size", "profile_scratch_size")
"""What a launcher knows of memory that a kernel needs beside its arguments: it is new for each launch."""


class Repeat:
    """A launch that has been made, but for its addresses.

    All else is as it was, sizes and strides included, and so is what Triton compiled. It compiled for what
    it saw of the addresses too: who repeats a launch passes None where there was None, the same dtypes on
    the same device, which is the current one, and multiples of 16 where there were such.
    """

    __slots__ = ("_args", "_blanks", "_compiled", "_device", "_given", "_launch", "_stream_of")

    def __init__(self, compiled: Any, programs: int, args: Sequence[Any]) -> None:
        """Keep a launch of so many programs.

        Args:
            compiled: what Triton launched.
            programs: size of the grid, of one dimension.
            args: of the kernel; ``BLANK + 1`` stands for the first address that a call brings, and so on.
        """
        self._compiled = compiled
        self._device = driver.active.get_current_device()
        self._stream_of = driver.active.get_current_stream
        front = (programs, 1, 1, BLANK, compiled.function, compiled.packed_metadata, None, None, None)
        self._given = [*front, *args]
        self._launch: Callable[..., object] | None = None  # found when it is due: many calls come only once
        self._args: list[Any] = []
        self._blanks: list[tuple[int, int]] = []

    def __call__(self, *addresses: int | None) -> None:
        """Launch on the current stream, with the kernel's ``*_ptr`` in their order."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Does a hook do anything? Triton 3.4 has none or one, later versions a chain that may be empty.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            self._tell(addresses)
            return
        launch = self._launch or self._settle()
        fill = (self._stream_of(self._device), *addresses)
        args = self._args.copy()
        for place, number in self._blanks:
            args[place] = fill[number]
        launch(*args)

    def _settle(self) -> Callable[..., object]:
        """Find what there is to call: the launch itself last, for another thread may come by."""
        launch, self._args = handed_on(self._compiled.run, self._given)
        self._blanks = blanks(self._args)
        self._launch = launch
        return launch

    def _tell(self, addresses: tuple[int | None, ...]) -> None:
        """Launch the way Triton does where hooks listen."""
        fill = (self._stream_of(self._device), *addresses)
        args = self._given.copy()
        for place, number in blanks(args):
            args[place] = fill[number]
        told = self._compiled.launch_metadata(tuple(args[:STREAM]), fill[0], *args[FIRST:])
        hooks = knobs.runtime
        args[METADATA : EXIT_HOOK + 1] = told, hooks.launch_enter_hook, hooks.launch_exit_hook
        self._compiled.run(*args)


def handed_on(launcher: Any, given: list[Any]) -> tuple[Callable[..., object], list[Any]]:
    """Where a launcher of Triton ends: a function in C, and all that it is given there.

    It is asked once, with blanks, what it would call. A launcher of another make, or one that does more than
    to pass its arguments on, is its own answer.

    Args:
        launcher: of a compiled kernel.
        given: its arguments, some of them blank.
    """
    if "launch" not in getattr(launcher, "__dict__", {}) or any(getattr(launcher, x, 0) for x in SCRATCH):
        return launcher, given
    heard: list[list[Any]] = []
    asked = copy.copy(launcher)
    asked.launch = lambda *args: heard.append([*args])
    asked(*given)
    numbers = [sorted(number for _, number in blanks(args)) for args in (given, *heard)]
    if len(heard) != 1 or numbers[0] != numbers[1]:
        return launcher, given
    return launcher.launch, heard[0]


def blanks(args: list[Any]) -> list[tuple[int, int]]:
    """Places of the blanks among arguments, and the number of each."""
    return [(place, x - BLANK) for place, x in enumerate(args) if type(x) is int and x >= BLANK]


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
    again = [*args, *(constants[name] for name in kernel.arg_names[len(args) :])]
    for number, place in enumerate(_addresses(kernel)):
        if again[place] is not None:  # a tensor kept here would never be freed
            again[place] = BLANK + 1 + number
    return Repeat(compiled, programs, again)


@functools.cache
def _addresses(kernel: Any) -> tuple[int, ...]:
    """Which arguments of a kernel are addresses."""
    return tuple(place for place, name in enumerate(kernel.arg_names) if name.endswith("_ptr"))
