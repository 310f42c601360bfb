"""``transformers serve`` with our attention: it has a list of the names that it takes, which lacks ours.

::

    python -m flash_decoding.transformers.serving MODEL --continuous-batching \\
        --attn-implementation flash_decoding

All arguments are those of ``transformers serve``.
"""

from __future__ import annotations

import functools

from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from flash_decoding.transformers.registration import NAME, register


def accept_name() -> None:
    """Let the server take our name; calling it again does nothing. All other checks are what they were."""
    check = ModelManager._validate_args
    if hasattr(check, "knows_flash_decoding"):
        return

    @functools.wraps(check)
    def checked(self: ModelManager) -> None:
        if self.attn_implementation != NAME:
            check(self)  # type: ignore[no-untyped-call]
            return
        self.attn_implementation = None  # what remains is checked without it
        try:
            check(self)  # type: ignore[no-untyped-call]
        finally:
            self.attn_implementation = NAME

    checked.knows_flash_decoding = True  # type: ignore[attr-defined]  # a mark on a function of our own
    ModelManager._validate_args = checked  # type: ignore[method-assign]  # the hook itself


def main() -> None:
    """Register, and hand over to Transformers."""
    import typer

    register()
    accept_name()
    typer.run(Serve)


if __name__ == "__main__":
    main()
