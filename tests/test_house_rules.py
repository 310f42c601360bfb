"""The house rules that a program can check: sizes, forbidden statements, docstrings that tell the truth."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.source_tree import PACKAGE, ROOT, Def, Module, depth, functions, modules

SOURCES = modules(PACKAGE, "tests", "examples", "tools")
OURS = [module for module in SOURCES if module.name.startswith(PACKAGE)]
TESTS = [module for module in SOURCES if module.name.startswith("tests")]

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
MAX_PARAMETERS = 8
MAX_DEPTH = 3

DICTATED_SIGNATURES = {
    "api": "what a caller can ask for, all by keyword",
    "plan.explain": "the same, in plain numbers",
    "flash_attn": "the signatures of flash-attn",
    "ops": "schemas of operators carry tensors and scalars, no records",
    "kernels": "kernels take no records; their launchers hand over what they take",
    "cli": "options of a command, a parameter each",
    "cache": "sizes of a cache, all by keyword",
}
"""Modules whose functions may have more parameters, and why."""

FORBIDDEN_TEXT = {
    r"/(work|root|home)/": "a path of somebody's machine",
    r"\b[Ii]ssue #?\d": "a number that only a tracker explains",
    r"\b(TODO|FIXME|XXX)\b": "work that belongs to a list, not into the source",
    r"^(<{7}|>{7}|={7})( |$)": "a merge conflict",
}


def places(module: Module, kind: type[ast.AST]) -> Iterator[ast.AST]:
    return (node for node in ast.walk(module.tree) if isinstance(node, kind))


def defs(sources: list[Module]) -> list[Def]:
    return [function for module in sources for function in functions(module)]


def called(node: ast.AST) -> str:
    """The name that a call calls, without what stands before the last dot; "" if it is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return ast.unparse(node.func).rsplit(".", maxsplit=1)[-1]


def test_files_are_small() -> None:
    long = {str(m): m.text.count("\n") for m in SOURCES if m.text.count("\n") > MAX_FILE_LINES}
    assert not long


def test_functions_are_short() -> None:
    limits = {True: MAX_KERNEL_LINES, False: MAX_FUNCTION_LINES}
    long = {str(f): f.lines for f in defs(SOURCES) if f.lines > limits[f.is_kernel]}
    assert not long


def test_functions_take_few_parameters() -> None:
    greedy = {
        str(f): len(f.parameters)
        for f in defs(SOURCES)
        if len(f.parameters) > MAX_PARAMETERS
        and not f.is_kernel
        and not f.module.name.removeprefix(f"{PACKAGE}.").startswith(tuple(DICTATED_SIGNATURES))
    }
    assert not greedy


def test_statements_do_not_nest_deeply() -> None:
    deep = {str(f): depth(f.node) for f in defs(SOURCES) if depth(f.node) > MAX_DEPTH}
    assert not deep


def test_everything_is_annotated() -> None:
    bare = [
        str(f)
        for f in defs(SOURCES)
        if f.node.returns is None or any(argument.annotation is None for argument in f.parameters)
    ]
    assert not bare


def test_every_module_and_public_name_has_a_docstring() -> None:
    """Properties and kernels are left out: the former are named in the legend, the latter in their module."""
    silent = [str(module) for module in SOURCES if ast.get_docstring(module.tree) is None and module.text]
    for module in OURS:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                silent += [] if ast.get_docstring(node) else [f"{module}:{node.lineno} {node.name}"]
    for function in defs(OURS):
        is_property = any(ast.unparse(d) == "property" for d in function.node.decorator_list)
        if function.is_public and not is_property and not function.is_kernel:
            silent += [] if ast.get_docstring(function.node) else [str(function)]
    assert not silent


def documented_names(docstring: str) -> list[str]:
    """The names in the section ``Args:`` of a docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring + "\n", re.MULTILINE)
    if section is None:
        return []
    listed = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section.group(1), re.MULTILINE)
    return [name.lstrip("*") for names in listed for name in names.split(", ")]


def described(module: Module) -> Iterator[tuple[str, str, set[str]]]:
    """Where, docstring and real parameters of every function, and of every class for its ``__init__``."""
    for function in functions(module):
        names = {argument.arg for argument in function.parameters}
        yield str(function), ast.get_docstring(function.node) or "", names
        if function.owner is not None and function.node.name == "__init__":
            yield str(function), ast.get_docstring(function.owner) or "", names


@pytest.mark.parametrize("module", OURS, ids=str)
def test_documented_parameters_exist(module: Module) -> None:
    for place, docstring, names in described(module):
        stale = set(documented_names(docstring)) - names
        assert not stale, f"{place} documents {sorted(stale)}"


def test_the_docstring_parser_sees_names() -> None:
    docstring = (
        "Do it.\n\nArgs:\n    a: first,\n        more: of it.\n    b, c: both.\n\nReturns:\n    d: no."
    )
    assert documented_names(docstring) == ["a", "b", "c"]


def test_no_except_swallows_errors() -> None:
    blanket = {"", "Exception", "BaseException"}
    wrong = []
    for module in SOURCES:
        for node in places(module, ast.ExceptHandler):
            assert isinstance(node, ast.ExceptHandler)
            caught = ast.unparse(node.type) if node.type else ""
            empty = all(isinstance(line, ast.Pass) or ast.unparse(line) == "..." for line in node.body)
            wrong += [f"{module}:{node.lineno} {caught}"] if caught in blanket or empty else []
        for call in places(module, ast.Call):
            if called(call) == "suppress":
                wrong.append(f"{module} suppress")
    assert not wrong


def test_the_environment_is_read_in_one_place() -> None:
    pattern = re.compile(r"\bos\.(environ|getenv|putenv)\b|from os import")
    readers = [str(m) for m in OURS if m.unit != "settings" and pattern.search(m.text)]
    assert not readers


def test_only_the_command_line_and_the_bench_print() -> None:
    talkers = [
        str(module)
        for module in OURS
        if module.unit not in ("cli", "bench", "__main__")
        and any(called(node) == "print" for node in places(module, ast.Call))
    ]
    assert not talkers


def test_comparisons_in_tests_are_asserted() -> None:
    ignored = [
        f"{module}:{node.lineno}"
        for module in TESTS
        for node in places(module, ast.Expr)
        if isinstance(node, ast.Expr)
        and (called(node.value) in ("allclose", "equal", "isclose") or isinstance(node.value, ast.Compare))
    ]
    assert not ignored


def asserting(tests: list[Def]) -> set[str]:
    """Functions that can fail on purpose: by an assert, an expected error, or by calling one that can."""
    can_fail = {"raises", "opcheck", "assert_close"}
    calls = {f.node.name: {called(part) for part in ast.walk(f.node)} for f in tests}
    can_fail |= {f.node.name for f in tests if any(isinstance(part, ast.Assert) for part in ast.walk(f.node))}
    while new := {name for name, inside in calls.items() if inside & can_fail} - can_fail:
        can_fail |= new
    return can_fail


def test_every_test_can_fail() -> None:
    can_fail = asserting(defs(TESTS))
    tests = [f for f in defs(TESTS) if f.node.name.startswith("test_") and not f.nested]
    assert not [str(f) for f in tests if f.node.name not in can_fail]


def test_exemptions_say_which_rule_and_why() -> None:
    """``type: ignore[code]  # why`` and ``noqa: CODE - why``; retries of tests have no good reason.

    That a library's function has no types is reason enough to call it untyped.
    """
    explained = re.compile(r"ignore\[no-untyped-call\]|ignore\[[\w, -]+\]  # \w")
    bare = []
    for module in SOURCES:
        for number, line in enumerate(module.text.splitlines(), 1):
            ignore = re.search(r"# type: ignore", line) and not explained.search(line)
            noqa = re.search(r"# noqa", line) and not re.search(r"# noqa: [A-Z0-9, ]+ - \w", line)
            if (ignore or noqa or "mark.flaky" in line) and module.path.name != "test_house_rules.py":
                bare.append(f"{module}:{number}")
    assert not bare


def text_files() -> list[str]:
    patterns = ["*.md", "*.toml", "*.txt", "Makefile", ".ci/*", "docs/**/*.md", "tools/*"]
    paths = [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted({*paths, *(str(module) for module in SOURCES)} - {"tests/test_house_rules.py"})


@pytest.mark.parametrize("name", text_files())
def test_the_project_speaks_of_itself_alone(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [
        f"{hit.group()!r}: {why}"
        for rule, why in FORBIDDEN_TEXT.items()
        for hit in re.finditer(rule, text, re.M)
    ]
    assert not found
