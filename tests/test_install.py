"""What is installed: one wheel for every platform, that works without Triton and reads no foreign files."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.source_tree import PACKAGE, ROOT

BLOCKED = ("triton", "rich", "typer", "matplotlib", "transformers", "numpy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy: building leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / PACKAGE, source / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True, timeout=300)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_one_wheel_fits_every_platform(wheel: zipfile.ZipFile) -> None:
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {path for path in (ROOT / PACKAGE).rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    assert inside == {str(path.relative_to(ROOT)) for path in files}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_installing_needs_torch_and_on_linux_triton_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert sorted(need.split(">")[0] for need in needs) == ["torch", "triton"]
    assert [need for need in needs if "Linux" in need] == [need for need in needs if "triton" in need]
    assert metadata["License-Expression"] == "Apache-2.0"


def run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script with the package on its path, but none of the optional packages."""
    block = (
        f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\nsys.path.insert(0, {str(ROOT)!r})\n"
    )
    return subprocess.run(
        [sys.executable, "-c", block + script],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_without_triton_everything_runs_on_the_cpu(tmp_path: Path) -> None:
    ran = run(
        """
import torch
import flash_decoding as fd
from flash_decoding.flash_attn import flash_attn_with_kvcache
cache = fd.PagedCache(8, 5, 2, 16, max_batch=2, dtype=torch.float32)
cache.allocate(7)
cache.advance(7)
k, v = torch.randn(2, 2, 7, 2, 16)
fd.append_kv(k, v, **cache.writing())
q = torch.randn(2, 1, 4, 16)
out, lse = fd.decode_attention(q, **cache.reading(), return_lse=True)
keys, values = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
want = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)
# Two orders of summing 7 numbers of size 1 in float32: some roundings of 2**-24 apart.
assert (out - want).abs().max() < 16 * 2**-24, (out - want).abs().max()
theirs = flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=7, block_table=cache.block_table)
assert torch.equal(theirs, out)
print(fd.explain(batch=1, heads_q=16, heads_kv=2, head_dim=128, kv_len=65536, gpu="H200"))
""",
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert "split" in ran.stdout


def test_the_command_line_says_what_to_install(tmp_path: Path) -> None:
    ran = run(f"import {PACKAGE}.cli as cli\ncli.main()", tmp_path)
    assert ran.returncode != 0
    assert "pip install" in ran.stderr + ran.stdout


def test_the_package_is_typed() -> None:
    assert (ROOT / PACKAGE / "py.typed").exists()
