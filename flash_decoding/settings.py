"""Settings of the process: the one place that reads the environment.

``FLASH_DECODING_CHECK=1`` starts the process in checking mode: lengths, page numbers and indices that lie in
tensors are then checked by value before every call. That copies them to the host and waits for the device,
so it is a tool for finding bugs, not a mode to serve in. Nothing is checked by value while ``torch.compile``
traces or a CUDA graph is captured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flash_decoding.errors import InvalidInput

CHECK_VARIABLE = "FLASH_DECODING_CHECK"


def _read_switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise InvalidInput(name, repr(value), "1 (on) or 0 (off)")
    return value == "1"


_checking = _read_switch(CHECK_VARIABLE)


def is_checking() -> bool:
    """True where tensor-valued lengths, indices and page numbers are checked by value."""
    return _checking


def set_checking(enabled: bool) -> None:
    """Switch checking mode on or off for the whole process."""
    global _checking  # noqa: PLW0603 - the switch of the process lives here, and nowhere else
    _checking = enabled


@contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Check by value (or not) inside a ``with`` block, then return to what was before."""
    before = _checking
    set_checking(enabled)
    try:
        yield
    finally:
        set_checking(before)
