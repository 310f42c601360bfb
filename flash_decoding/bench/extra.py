"""The optional packages behind the command line and the bench."""

from __future__ import annotations

import importlib.util

from flash_decoding.errors import MissingDependency


def require(*packages: str, extra: str = "bench") -> None:
    """Make sure that packages are there.

    Args:
        packages: what is going to be imported.
        extra: which extra of this package brings them.

    Raises:
        MissingDependency: the first one that is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, f'pip install "flash-decoding[{extra}]"')
