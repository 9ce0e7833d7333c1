"""The order of the rooms, as CONTRIBUTING.md states it, and their size."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support import ROOT

PACKAGE = ROOT / "src" / "equiloss"
# Halves of one thing: the only modules that may import each other.
CIRCLE = [f"equiloss.training.{name}" for name in ("bitwise", "classifier", "step")]


def module(file: Path) -> str:
    """Dotted name of a file below src."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Modules of the package that one imports: at its top, late, or for type checking."""
    return set(imports_of(FILES[name].read_text()))


def imports_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("equiloss"))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "equiloss":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else str(node.module)


def room(name: str) -> str:
    """The module or package at the first level."""
    return name.split(".")[1] if "." in name else ""


def stated_order() -> list[str]:
    """The rooms as CONTRIBUTING.md lists them, each using those above it."""
    return re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)


def downward(name: str, order: list[str]) -> list[str]:
    """What a module imports of rooms further down the list."""
    mine = order.index(room(name))
    return [other for other in imports(name) if room(other) and order.index(room(other)) > mine]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or by way of others.

    >>> circles({"a": {"b"}, "b": {"a"}, "c": {"a"}})
    [['a', 'b']]
    """
    reach = {name: set(others) for name, others in graph.items()}
    for middle in graph:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    groups = ({other for other in reach[n] if n in reach[other]} for n in graph if n in reach[n])
    return sorted(sorted(group) for group in {frozenset(group) for group in groups})


def test_the_first_level_is_small() -> None:
    modules = [path for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    packages = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(modules) <= 7
    assert len(packages) <= 16
    rooms = {path.stem for path in modules} | {path.name for path in packages}
    assert rooms == set(stated_order())


def test_no_import_points_down_the_list() -> None:
    order = stated_order()
    assert {name: down for name in FILES if room(name) and (down := downward(name, order))} == {}


def test_the_only_circle_is_the_step_and_its_halves() -> None:
    graph = {name: imports(name) & FILES.keys() for name in FILES}
    assert circles(graph) == [CIRCLE]


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
import equiloss.run
if TYPE_CHECKING:
    from equiloss.data import sampler
def late():
    from equiloss.losses.registry import names
"""
    expected = {"equiloss.run", "equiloss.data.sampler", "equiloss.losses.registry"}
    assert set(imports_of(source)) == expected


def test_files_and_functions_are_short() -> None:
    long = []
    for name, file in FILES.items():
        source = file.read_text()
        if len(source.splitlines()) > 300:
            long.append(name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                # The main path's fits a screen.
                if lines > (40 if (name, node.name) == ("equiloss.run", "run") else 60):
                    long.append(f"{name}.{node.name}")
    assert long == []
