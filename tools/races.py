"""What the race checker reported, by what the two accesses are for; and which of it is new.

It reports races of warps with roles that share nothing, so it cannot tell there. ``tools/control.py`` has
kernels that are right by their few lines: what is reported of them, and nothing else, is let pass in kernels
of such warps. Of every other kernel nothing is.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITH_ROLES = (*sorted((ROOT / "flash_decoding/kernels/roles").glob("*.py")), ROOT / "tools/control.py")
CONTROL = ("apart_kernel", "hand_over_kernel")

PURPOSES = {
    "_kernel(": "start of warps",
    "gl.warp_specialize(": "start of warps",
    ".load(gl.DotOperandLayout(": "tile read",
    "async_load(": "tile filled",
}
"""What a line of source that has so much in it is for. Triton's own steps go by the line of the kernel."""

FIRST = re.compile(r"Race reported between (\w+) access at (\w+)\+\w+ in (\S+):(\d+)")
OTHER = re.compile(r"and (\w+) access at \w+\+\w+ in (\S+):(\d+) \[(\d+) hazards\]")


@functools.cache
def sources() -> dict[Path, str]:
    """The text of all that has warps with roles."""
    return {path: path.read_text() for path in WITH_ROLES}


def purpose_of(kernel: str, file: str, line: int) -> str:
    """What a line is for in a kernel of warps with roles; the line itself where that is not known, and in all
    other kernels. Of a path, logs have the last part.
    """
    has_roles = any(f"def {kernel}(" in text for text in sources().values())
    texts = [text for path, text in sources().items() if path.name == file and has_roles]
    for code in (code for text in texts for code in text.splitlines()[line - 1 : line]):
        for part, purpose in PURPOSES.items():
            if part in code:
                return purpose
    return f"{file}:{line}"


def races_of(log: str) -> Counter[tuple[str, str]]:
    """Hazards of a log, by kernel and by what its two accesses are for."""
    races: Counter[tuple[str, str]] = Counter()
    kernel = first = ""
    for line in log.splitlines():
        if found := FIRST.search(line):
            kernel, first = found[2], f"{found[1].lower()}, {purpose_of(found[2], found[3], int(found[4]))}"
        elif found := OTHER.search(line):
            second = f"{found[1].lower()}, {purpose_of(kernel, found[2], int(found[3]))}"
            races[kernel, " / ".join(sorted((first, second)))] += int(found[4])
    return races


def reports_of(log: str) -> int:
    """How many races a log tells of. The checker counts more where it was told to show no more of them."""
    return len(FIRST.findall(log))


def beyond_the_control(races: Counter[tuple[str, str]]) -> dict[str, int]:
    """Hazards of a kind that the control does not have, by kernel and kind."""
    known = {kind for kernel, kind in races if kernel in CONTROL}
    return {f"{kernel}: {kind}": hazards for (kernel, kind), hazards in races.items() if kind not in known}
