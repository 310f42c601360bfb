"""``flash-decoding generate``: a checkpoint, a prompt, text as it comes, and what it cost."""

from __future__ import annotations

from flash_decoding.cli.generation.job import Job
from flash_decoding.cli.generation.run import run

__all__ = ["Job", "run"]
