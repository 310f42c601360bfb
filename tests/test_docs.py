"""The documents agree with the code where they repeat it."""

from __future__ import annotations

import re

import pytest

from flash_decoding import __version__, spec
from tests.source_tree import PACKAGE, ROOT
from tests.test_import_floors import FLOORS

DOCUMENTS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its header."""
    lines = text.partition(f"## {heading}\n")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def test_the_legend_is_that_of_the_code() -> None:
    legend = re.findall(r"^([a-z]\w*)  +\S", (spec.__doc__ or "").partition("\nTensors")[0], re.MULTILINE)
    lines = read("DESIGN.md").partition("## Legend\n")[2].partition("\n## ")[0].splitlines()
    shown = [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:]
    assert shown == legend


def test_the_floors_are_those_that_are_held() -> None:
    shown: dict[int, set[str]] = {}
    floor = 0
    for number, names, _ in table(read("DESIGN.md").partition("\nFolders on floor 2")[0], "Floors"):
        floor = int(number) if number else floor
        units = {name.removesuffix(".py").rstrip("/") for name in re.findall(r"`([\w./]+)`", names)}
        shown.setdefault(floor, set()).update(units)
    assert shown == {floor: set(units) for floor, units in FLOORS.items() if floor < 10}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    """Paths with a slash, and links; what is yet to come is named in the last section of DESIGN.md alone."""
    text = read(name).partition("## Where things will go")[0]
    named = set(re.findall(r"`([\w.]+/[\w./]*)`", text)) | set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
    generated = {"out/", ".ci/run", "results/"}
    missing = [
        path for path in named - generated if not any((ROOT / base / path).exists() for base in ("", PACKAGE))
    ]
    assert not missing


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    named = {
        target for name in DOCUMENTS for target in re.findall(r"(?:^|`)make (\w+)", read(name), re.MULTILINE)
    }
    assert named
    assert named <= targets


def test_the_version_is_one() -> None:
    assert f'version = "{__version__}"' in read("pyproject.toml")
