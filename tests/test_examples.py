"""The examples run as they are, and the README shows the first of them word for word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path)]
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert not ran.stderr


def test_the_readme_shows_the_ten_lines() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:1]
    code = (ROOT / "examples" / "decode_ten_lines.py").read_text(encoding="utf-8")
    assert shown == code.partition('"""\n\n')[2]
