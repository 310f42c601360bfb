"""``transformers serve`` takes our name, and all else as before."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers.cli.serving.model_manager import ModelManager

from flash_decoding.transformers import serving


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelManager, "_validate_args", ModelManager._validate_args)
    serving.accept_name()


def test_the_server_takes_our_name() -> None:
    manager = ModelManager(device="cpu", attn_implementation="flash_decoding")
    assert manager.attn_implementation == "flash_decoding"


def test_other_names_are_refused_as_before() -> None:
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'flash_decodign'"):
        ModelManager(device="cpu", attn_implementation="flash_decodign")
    assert ModelManager(device="cpu", attn_implementation="sdpa").attn_implementation == "sdpa"


def test_the_other_checks_still_run() -> None:
    with pytest.raises(ValueError, match="quantization"):
        ModelManager(device="cpu", attn_implementation="flash_decoding", quantization="none-bit")


def test_accepting_twice_changes_nothing() -> None:
    before = ModelManager._validate_args
    serving.accept_name()
    assert ModelManager._validate_args is before


def test_the_command_line_is_that_of_transformers() -> None:
    command = [sys.executable, "-m", "flash_decoding.transformers.serving", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "--host" in ran.stdout
