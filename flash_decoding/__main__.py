"""``python -m flash_decoding``: the same as the command ``flash-decoding``."""

from __future__ import annotations

from flash_decoding.cli import main

main()
