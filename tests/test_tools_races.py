"""Races that a checker reports: told apart by what lines are for, and let pass as the control has them."""

from __future__ import annotations

from pathlib import Path

from tools import races
from tools.summary import is_clean, of_sanitizer

KERNELS = races.ROOT / "flash_decoding/kernels/roles"
CONTROL = races.ROOT / "tools/control.py"


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
    start = started("attend_roles_kernel", KERNELS / "attend.py", 1)
    ring = handed_over("attend_roles_kernel", KERNELS / "multiplying.py", KERNELS / "loading.py", 1)
    assert kinds(start) == {"read, start of warps / write, start of warps"}
    assert kinds(start) == kinds(started("apart_kernel", CONTROL, 1))
    assert kinds(ring) == {"read, tile read / write, tile filled"}
    assert kinds(ring) == kinds(handed_over("hand_over_kernel", CONTROL, CONTROL, 1))


def test_what_the_control_does_not_have_is_beyond_it() -> None:
    start = started("attend_roles_kernel", KERNELS / "attend.py", 7)
    ring = handed_over("attend_roles_kernel", KERNELS / "multiplying.py", KERNELS / "loading.py", 9)
    other = report("combine_kernel", "combine.py:7", "combine.py:8", 2)
    control = started("apart_kernel", CONTROL, 3)
    assert races.beyond_the_control(races.races_of(start + control)) == {}
    assert sum(races.beyond_the_control(races.races_of(start)).values()) == 7
    beyond = races.beyond_the_control(races.races_of(start + control + ring + other))
    assert beyond == {
        "attend_roles_kernel: read, tile read / write, tile filled": 9,
        "combine_kernel: read, combine.py:7 / write, combine.py:8": 2,
    }


def test_nothing_is_let_pass_in_kernels_without_roles() -> None:
    """A log names the last part of a path alone, and files of both kinds of kernels have the same names."""
    line = line_of(KERNELS / "attend.py", "def attend_roles_kernel(")
    assert kinds(report("attend_kernel", line, line, 1)) == {f"read, {line} / write, {line}"}


def test_a_record_is_clean_where_every_report_was_read(tmp_path: Path) -> None:
    ending = "========= RACECHECK SUMMARY: 2 hazards displayed ({} errors, 0 warnings)\n"
    both = started("attend_roles_kernel", KERNELS / "attend.py", 7) + started("apart_kernel", CONTROL, 3)
    memcheck, racecheck = tmp_path / "memcheck-0.log", tmp_path / "racecheck-0.log"
    memcheck.write_text("========= ERROR SUMMARY: 0 errors\n")
    for errors, clean in ((2, True), (3, False)):
        racecheck.write_text(both + ending.format(errors))
        assert is_clean(of_sanitizer([memcheck, racecheck])) is clean
