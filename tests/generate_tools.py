"""The command ``generate``, called as by a shell."""

from __future__ import annotations

import typer
from typer.testing import CliRunner, Result

from flash_decoding.cli.generate import generate

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(generate)


def call(*arguments: object, text: str | None = None) -> Result:
    """Run it with arguments, and with a text on standard input."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


def assert_refused(result: Result, message: str) -> None:
    """Assert exit status 2, one line of ours on standard error, and nothing on standard output."""
    assert result.exit_code == 2, result.output
    said = [line for line in result.stderr.splitlines() if line.startswith("flash-decoding: ")]
    assert len(said) == 1
    assert said[0].startswith(f"flash-decoding: {message}")
    assert result.stdout == ""
    assert "Traceback" not in result.output
