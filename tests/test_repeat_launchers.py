"""What a launcher of Triton hands on, and launchers that are not gone around."""

from __future__ import annotations

from typing import Any

import pytest

from flash_decoding.kernels.repeat import BLANK, blanks, handed_on

GIVEN = [8, 1, 1, BLANK, 77, (4, 1, 0), None, None, None, BLANK + 1, None, BLANK + 3, (64, 1), 0.5, BLANK - 1]
"""A stream, two addresses where there could be three, and what stays as it is."""


class Launcher:
    """As Triton's: options of its own go between, then it ends in a function that it has."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.launch: Any = lambda *args: self.launched.append(args)

    def __call__(self, *given: Any) -> None:
        self.launch(*given[:5], False, True, None, *given[5:])


class WithScratch(Launcher):
    """For a kernel that needs memory of its own."""

    profile_scratch_size = 128


class Packing(Launcher):
    """As Triton's from 3.7 on: the kernel's own arguments are one."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given[:5], False, True, *given[5:9], None, given[9:])


class Extending(Launcher):
    """The same, and one more that the kernel is not given otherwise."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given[:9], (*given[9:], 99))


class Repeating(Launcher):
    """Puts an address in two places."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given, given[9])


class Twice(Launcher):
    """Launches more than one kernel."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given)
        self.launch(*given)


class Idle(Launcher):
    """Launches nothing of its own."""

    def __call__(self, *given: Any) -> None:
        """Somebody else does."""


class WithMethod:
    """Of another make: what it calls is no function that it was given."""

    def launch(self, *given: Any) -> None:
        """Take all."""

    def __call__(self, *given: Any) -> None:
        self.launch(*given)


def test_a_launcher_hands_on_its_arguments_and_its_own() -> None:
    launcher = Launcher()
    launch, args = handed_on(launcher, GIVEN)
    assert launch is launcher.launch
    assert args == [*GIVEN[:5], False, True, None, *GIVEN[5:]]
    assert blanks(args) == [(3, 0), (12, 1), (14, 3)]
    assert launcher.launched == []


def test_arguments_that_go_as_one_are_filled_in_one_by_one() -> None:
    launcher = Packing()
    launch, args = handed_on(launcher, GIVEN)
    assert args == [*GIVEN[:5], False, True, *GIVEN[5:9], None, *GIVEN[9:]]
    assert blanks(args) == [(3, 0), (12, 1), (14, 3)]
    assert launcher.launched == []
    launch(*args)
    assert launcher.launched == [(*GIVEN[:5], False, True, *GIVEN[5:9], None, tuple(GIVEN[9:]))]


@pytest.mark.parametrize("make", [WithScratch, Extending, Repeating, Twice, Idle, WithMethod])
def test_what_is_not_simply_handed_on_goes_through_the_launcher(make: type[Launcher]) -> None:
    launcher = make()
    launch, args = handed_on(launcher, GIVEN)
    assert launch is launcher
    assert args == GIVEN
    assert getattr(launcher, "launched", []) == []
