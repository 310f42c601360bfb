"""The tool that times versions of the package side by side, on a CPU."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from flash_decoding.bench.cases import Case
from tools.compare import PACKAGE, ROOT, compare

CPU = torch.device("cpu")
CASE = Case(batch=2, kv_len=64, dtype=torch.float32, device=CPU, label="tiny")


def line(**versions: Path) -> str:
    """What is said of the tiny case."""
    (said,) = compare({name: str(place) for name, place in versions.items()}, [CASE], CPU, 0.001)
    return said


def test_each_version_has_its_multiples_of_the_floor() -> None:
    said = line(again=ROOT)
    numbers = dict(re.findall(r"(here|here, invariant|again|again, invariant) (\d+\.\d{3})", said))
    assert set(numbers) == {"here", "here, invariant", "again", "again, invariant"}
    assert said.startswith("tiny: floor ")


def test_a_version_that_is_wrong_has_no_time(tmp_path: Path) -> None:
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE)
    path = tmp_path / PACKAGE / "bench" / "baselines" / "ours.py"
    right = "return out if isinstance(out, Tensor)"
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, "return 2 * out if isinstance(out, Tensor)"))
    said = line(doubled=tmp_path)
    assert re.search(r"here \d+\.\d{3}", said)
    assert not re.search(r"doubled(, invariant)? \d+\.\d{3}", said)
