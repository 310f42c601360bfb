"""Who may import whom, and what importing the library pulls in."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.source_tree import PACKAGE, ROOT, Module, imports, modules

FLOORS: dict[int, tuple[str, ...]] = {
    1: ("spec", "projection", "invariant", "errors", "settings"),
    2: ("kernels", "plan", "cpu", "sdpa", "validate", "cache", "reference", "eager"),
    3: ("execute", "repeats"),
    4: ("ops",),
    5: ("api", "calls"),
    6: ("flash_attn", "transformers"),
    7: ("decoder",),
    8: ("bench",),
    9: ("cli",),
    10: ("", "__main__"),  # the package itself re-exports what is public; python -m runs the command line
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}

NEIGHBOURS = {
    ("settings", "errors"),
    ("execute", "repeats"),
    ("api", "calls"),
    ("transformers", "flash_attn"),
}
"""Imports between units of one floor that are meant."""

USERS_OF_THE_REFERENCE = {"bench"}
"""The reference is the specification: what it specifies never calls it."""

HEAVY: dict[str, tuple[str, ...]] = {
    "triton": ("kernels", "bench.baselines.read_kernel", "bench.baselines.one_block"),
    "matplotlib": ("bench",),
    "rich": ("bench", "cli"),
    "typer": ("cli",),
    "transformers": ("transformers", "decoder"),
    "numpy": (),
}
"""Packages that load slowly or may be missing, and the modules that import them at the top of a file."""


def imported_units(module: Module) -> set[str]:
    """Units of this package that a module imports anywhere, in functions and for type checking too."""
    units = set()
    for name, _ in imports(module):
        package, _, rest = name.partition(".")
        if package == PACKAGE:
            unit = rest.split(".")[0]
            units.add(unit if unit in FLOOR_OF else "")
    return units


@pytest.mark.parametrize("module", modules(PACKAGE), ids=str)
def test_a_file_imports_from_lower_floors_or_its_own_folder(module: Module) -> None:
    assert module.unit in FLOOR_OF, f"{module} has no floor: add it to the table"
    floor = FLOOR_OF[module.unit]
    wrong = [
        unit
        for unit in imported_units(module)
        if unit != module.unit and FLOOR_OF[unit] >= floor and (module.unit, unit) not in NEIGHBOURS
    ]
    assert not wrong, f"{module} (floor {floor}) imports {wrong}"


@pytest.mark.parametrize("module", modules(PACKAGE), ids=str)
def test_nothing_optimised_imports_the_reference(module: Module) -> None:
    allowed = module.unit in USERS_OF_THE_REFERENCE | {"reference"}
    assert allowed or "reference" not in imported_units(module)


@pytest.mark.parametrize("module", modules(PACKAGE), ids=str)
def test_heavy_packages_are_imported_late(module: Module) -> None:
    top = {id(node) for node in module.tree.body}
    early = {name.split(".")[0] for name, node in imports(module) if id(node) in top}
    place = module.name.removeprefix(f"{PACKAGE}.")
    wrong = [
        package for package, allowed in HEAVY.items() if package in early and not place.startswith(allowed)
    ]
    assert not wrong, f"{module} imports {wrong} at its top"


def test_imports_inside_the_package_are_absolute() -> None:
    relative = [
        f"{module}:{node.lineno}"
        for module in modules(PACKAGE)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not relative


@pytest.mark.parametrize("name", [PACKAGE, f"{PACKAGE}.flash_attn"])
def test_importing_the_library_loads_nothing_but_itself(name: str) -> None:
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {name}\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(json.loads(ran.stdout))
    assert PACKAGE in loaded
    third_party = loaded - {PACKAGE, "torch"} - sys.stdlib_module_names
    assert not third_party, f"import {name} loads {sorted(third_party)}"
