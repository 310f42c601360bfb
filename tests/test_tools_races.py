"""Races that a checker reports: told apart by what lines are for, and let pass as the control has them."""

from __future__ import annotations

from pathlib import Path

from tools import races

KERNELS = Path(races.ROOT) / "flash_decoding/kernels/roles"


def line_of(file: Path, part: str) -> str:
    """A line that has ``part`` in it, as a log names it."""
    lines = file.read_text().splitlines()
    return f"{file.name}:{next(i for i, line in enumerate(lines, 1) if part in line)}"


def report(kernel: str, read: str, write: str, hazards: int) -> str:
    """As the race checker writes it."""
    return (
        f"========= Error: Race reported between Read access at {kernel}+0xf0 in {read}\n"
        f"=========     and Write access at {kernel}+0x4b30 in {write} [{hazards} hazards]\n"
    )


def started(kernel: str, file: Path, hazards: int) -> str:
    return report(kernel, line_of(file, f"def {kernel}("), line_of(file, "gl.warp_specialize("), hazards)


def handed_over(kernel: str, file_read: Path, file_filled: Path, hazards: int) -> str:
    read, filled = line_of(file_read, "buffer.load("), line_of(file_filled, "async_load(")
    return report(kernel, read, filled, hazards)


def kinds(log: str) -> set[str]:
    return {kind for _, kind in races.races_of(log)}


def test_lines_are_known_by_what_they_are_for() -> None:
    control = Path(races.ROOT) / "tools/control.py"
    start = started("attend_roles_kernel", KERNELS / "attend.py", 1)
    ring = handed_over("attend_roles_kernel", KERNELS / "multiplying.py", KERNELS / "loading.py", 1)
    assert kinds(start) == {"read, start of warps / write, start of warps"}
    assert kinds(start) == kinds(started("apart_kernel", control, 1))
    assert kinds(ring) == {"read, tile read / write, tile filled"}
    assert kinds(ring) == kinds(handed_over("hand_over_kernel", control, control, 1))


def test_what_the_control_does_not_have_is_beyond_it() -> None:
    start = started("attend_roles_kernel", KERNELS / "attend.py", 7)
    ring = handed_over("attend_roles_kernel", KERNELS / "multiplying.py", KERNELS / "loading.py", 9)
    other = report("combine_kernel", "combine.py:7", "combine.py:8", 2)
    control = started("apart_kernel", Path(races.ROOT) / "tools/control.py", 3)
    assert races.beyond_the_control(races.races_of(start + control)) == {}
    assert sum(races.beyond_the_control(races.races_of(start)).values()) == 7
    beyond = races.beyond_the_control(races.races_of(start + control + ring + other))
    assert beyond == {
        "attend_roles_kernel: read, tile read / write, tile filled": 9,
        "combine_kernel: read, combine.py:7 / write, combine.py:8": 2,
    }
