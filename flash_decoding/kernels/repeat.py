"""Launches that are made again with other addresses.

Triton's own launch looks at every argument of every call, to find the kernel that was compiled for such
arguments: some 25 microseconds of the host's time. A caller who knows that nothing but addresses has changed
hands them to the compiled kernel itself; or to what its launcher calls in turn, where that can be told.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

Settled = tuple[Callable[..., object], list[Any], list[tuple[int, int]]]
"""What there is to call, its arguments, and which of them are filled in from where."""


@dataclass(frozen=True)
class Repeat:
    """A launch that has been made, but for its addresses.

    All else is as it was, sizes and strides included, and so is what Triton compiled. It compiled for what
    it saw of the addresses too: who repeats a launch passes None where there was None, the same dtypes on
    the same device, which is the current one, and multiples of 16 where there were such.
    """

    compiled: Any
    """What Triton launched."""
    given: list[Any]
    """All that its launcher takes; ``BLANK`` is the stream, ``BLANK + 1`` the first ``*_ptr``, and so on."""

    def tell(self, fill: list[int | None], sources: Sequence[int]) -> None:
        """Launch the way Triton does where hooks listen; arguments as of a chain."""
        args = filled(self.given, placed(self.given, sources), fill)
        told = self.compiled.launch_metadata(tuple(args[:STREAM]), args[STREAM], *args[FIRST:])
        hooks = knobs.runtime
        args[METADATA : EXIT_HOOK + 1] = told, hooks.launch_enter_hook, hooks.launch_exit_hook
        self.compiled.run(*args)


class Chain:
    """Launches made again, one behind the other, on the stream that is current."""

    __slots__ = ("_device", "_links", "_settled", "_stream_of")

    def __init__(self, *links: tuple[Repeat, Sequence[int]]) -> None:
        """Keep launches, and for each ``*_ptr`` of their kernels where in a ``fill`` it is found."""
        self._links = links
        self._device = driver.active.get_current_device()
        self._stream_of = driver.active.get_current_stream
        self._settled: list[Settled] | None = None  # found when it is due: many calls come only once

    def __call__(self, fill: list[int | None]) -> None:
        """Launch all, with addresses from ``fill``, which is not kept."""
        fill.append(self._stream_of(self._device))
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Does a hook do anything? Triton 3.4 has none or one, later versions a chain that may be empty.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            for link, sources in self._links:
                link.tell(fill, sources)
            return
        for launch, given, places in self._settled or self._settle():
            args = given.copy()
            for place, source in places:
                args[place] = fill[source]
            launch(*args)

    def _settle(self) -> list[Settled]:
        """Find what there is to call: kept last, for another thread may come by."""
        settled = []
        for link, sources in self._links:
            launch, args = handed_on(link.compiled.run, link.given)
            settled.append((launch, args, placed(args, sources)))
        self._settled = settled
        return settled


def placed(args: list[Any], sources: Sequence[int]) -> list[tuple[int, int]]:
    """Places of the blanks among arguments, and of what fills each; the stream comes last in a ``fill``."""
    return [(place, sources[number - 1] if number else -1) for place, number in blanks(args)]


def filled(args: list[Any], places: list[tuple[int, int]], fill: list[int | None]) -> list[Any]:
    """Arguments without blanks."""
    args = args.copy()
    for place, source in places:
        args[place] = fill[source]
    return args


def handed_on(launcher: Any, given: list[Any]) -> tuple[Callable[..., object], list[Any]]:
    """Where a launcher of Triton ends: a function in C, and all that it is given there.

    It is asked once, with blanks, what it would call. A launcher of another make, or one that does more than
    to pass its arguments on, is its own answer. Since Triton 3.7 the kernel's own go there as one tuple.

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
    if len(heard) != 1:
        return launcher, given
    (args,), launch = heard, launcher.launch
    if args and args[-1] == tuple(given[FIRST:]):
        launch, args = functools.partial(_launch_packed, launch, len(args) - 1), [*args[:-1], *args[-1]]
    numbers = [sorted(number for _, number in blanks(each)) for each in (given, args)]
    return (launch, args) if numbers[0] == numbers[1] else (launcher, given)


def _launch_packed(launch: Callable[..., object], front: int, *args: object) -> None:
    """Launch with all arguments behind the first few as one."""
    launch(*args[:front], args[front:])


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
    front = (programs, 1, 1, BLANK, compiled.function, compiled.packed_metadata, None, None, None)
    return Repeat(compiled, [*front, *again])


@functools.cache
def _addresses(kernel: Any) -> tuple[int, ...]:
    """Which arguments of a kernel are addresses."""
    return tuple(place for place, name in enumerate(kernel.arg_names) if name.endswith("_ptr"))
