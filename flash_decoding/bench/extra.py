"""The optional packages behind the command line and the bench."""

from __future__ import annotations

import importlib.util

from flash_decoding.errors import MissingDependency

INSTALL = 'pip install "flash-decoding[bench]"'


def require(*packages: str) -> None:
    """Make sure that packages of the extra are there.

    Raises:
        MissingDependency: the first one that is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, INSTALL)
