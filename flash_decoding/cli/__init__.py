"""The command ``flash-decoding``: generate, bench, explain, info. The commands are in ``commands``."""

from __future__ import annotations

import sys

from flash_decoding.bench.extra import require
from flash_decoding.errors import FlashDecodingError


def main() -> None:
    """Run the command line. What goes wrong on purpose ends in one line on stderr and exit status 1."""
    try:
        require("typer", "rich")
        from flash_decoding.cli.commands import app

        app(prog_name="flash-decoding")
    except FlashDecodingError as error:
        sys.stderr.write(f"flash-decoding: {error}\n")
        raise SystemExit(1) from None
