"""The errors of the library: each names the argument, what it got and what would do."""

from __future__ import annotations


class FlashDecodingError(Exception):
    """Base of every error raised on purpose by this library."""


class InvalidInput(FlashDecodingError, ValueError):
    """An argument has a wrong shape, dtype, device, stride or value.

    Args:
        argument: name of the argument, as the caller wrote it.
        got: what was passed.
        wanted: what would do.
    """

    def __init__(self, argument: str, got: object, wanted: str) -> None:
        self.argument, self.got, self.wanted = argument, got, wanted
        super().__init__(f"{argument}: got {got}; wanted {wanted}")


class CacheFull(InvalidInput):
    """A cache has no room for the tokens asked for; nothing was written.

    Args:
        argument: name of the argument that asked for the room.
        wanted: how many were asked for.
        free: how many are free.
        what: what there is too little of: slots of a sequence, or pages of the pool.
    """

    def __init__(self, argument: str, wanted: int, free: int, what: str) -> None:
        super().__init__(argument, f"{wanted} {what}", f"at most {free}, which are free")
        self.free = free


class Unsupported(FlashDecodingError, NotImplementedError):
    """The call is well formed, but nothing here honours it.

    Args:
        what: the option or problem that is refused.
        reasons: one line per variant that was considered, each saying why it does not apply.
    """

    def __init__(self, what: str, reasons: tuple[str, ...] = ()) -> None:
        self.what, self.reasons = what, reasons
        super().__init__("\n  - ".join((what, *reasons)))


class MissingDependency(FlashDecodingError, ImportError):
    """An optional package is needed; the message carries the command that installs it."""

    def __init__(self, package: str, install: str) -> None:
        self.package, self.install = package, install
        super().__init__(f"{package} is needed for this; install it with: {install}")
