"""The project's own source as data: modules, imports, functions. What the house rules are checked on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "flash_decoding"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A Python file: where it lies and what it says."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Dotted name, ``flash_decoding.plan.planner``."""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def unit(self) -> str:
        """What the floors speak of: the file or folder directly in the package ("" for its __init__)."""
        return self.name.partition(".")[2].split(".")[0]

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))


@dataclass(frozen=True)
class Def:
    """A function with its place."""

    module: Module
    node: Function
    owner: ast.ClassDef | None
    nested: bool

    @property
    def is_kernel(self) -> bool:
        """True for a function that Triton compiles."""
        return any("jit" in ast.unparse(decorator) for decorator in self.node.decorator_list)

    @property
    def is_public(self) -> bool:
        names = [self.node.name] if self.owner is None else [self.node.name, self.owner.name]
        return not self.nested and not any(name.startswith("_") for name in names)

    @property
    def has_decorator(self) -> bool:
        return bool(self.node.decorator_list)

    @property
    def parameters(self) -> list[ast.arg]:
        """All parameters but self and cls."""
        args = self.node.args
        listed = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        listed += [arg for arg in (args.vararg, args.kwarg) if arg is not None]
        return [arg for arg in listed if arg.arg not in ("self", "cls")]

    @property
    def lines(self) -> int:
        """Lines from ``def`` to the end, the docstring not counted."""
        total = (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1
        first = self.node.body[0]
        if ast.get_docstring(self.node) is None:
            return total
        return total - ((first.end_lineno or first.lineno) - first.lineno + 1)

    def __str__(self) -> str:
        owner = f"{self.owner.name}." if self.owner else ""
        return f"{self.module}:{self.node.lineno} {owner}{self.node.name}"


def modules(*folders: str) -> list[Module]:
    """The Python files of these folders of the project, in order."""
    found = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            found.append(Module(path, text, ast.parse(text, str(path))))
    return found


def functions(module: Module) -> Iterator[Def]:
    """Every function of a module, methods and nested ones included."""

    def walk(node: ast.AST, owner: ast.ClassDef | None, nested: bool) -> Iterator[Def]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield Def(module, child, owner, nested)
                yield from walk(child, None, True)
            else:
                yield from walk(child, child if isinstance(child, ast.ClassDef) else owner, nested)

    return walk(module.tree, None, False)


def imports(module: Module) -> Iterator[tuple[str, ast.stmt]]:
    """Dotted names that a module imports, wherever in it; ``from a import b`` counts as ``a.b``."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node


def depth(node: ast.AST) -> int:
    """How deep the statements of a function nest; ``elif`` stays on the level of its ``if``."""
    deepest = 0
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, Function | ast.ClassDef):
                continue
            is_block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
            is_elif = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
            deepest = max(deepest, depth(child) + (is_block and not is_elif))
    return deepest
