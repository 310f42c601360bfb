"""``transformers serve`` with our attention: it has a list of the names that it takes, which lacks ours.

::

    python -m flash_decoding.transformers.serving MODEL --continuous-batching \\
        --attn-implementation flash_decoding

All arguments are those of ``transformers serve``.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from flash_decoding.transformers.hooks import teach
from flash_decoding.transformers.registration import NAME, register


def accept_name() -> None:
    """Let the server take our name; calling it again does nothing. All other checks are what they were."""

    def made(check: Callable[..., None]) -> Callable[..., None]:
        def checked(self: ModelManager) -> None:
            if self.attn_implementation != NAME:
                check(self)
                return
            self.attn_implementation = None  # what remains is checked without it
            try:
                check(self)
            finally:
                self.attn_implementation = NAME

        return checked

    teach(ModelManager, "_validate_args", made)


def main() -> None:
    """Register, and hand over to Transformers."""
    import typer

    register()
    accept_name()
    typer.run(Serve)


if __name__ == "__main__":
    main()
