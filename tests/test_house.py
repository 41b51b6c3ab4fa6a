"""The rooms import downwards only, and the command line stays light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import peftcli

PACKAGE = Path(peftcli.__file__).parent
FLOORS = ["cli", "launch", "training", "reports", "artifacts", "tasks", "data", "methods", "models", "config"]
"""Top to bottom."""


def imported(path: Path) -> set[str]:
    """Rooms that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("peftcli.")}
    return found & set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_from_those_below(room):
    above = set(FLOORS[: FLOORS.index(room)])
    guilty = {str(p.relative_to(PACKAGE)): up for p in (PACKAGE / room).rglob("*.py") if (up := imported(p) & above)}
    assert not guilty


def test_no_file_is_longer_than_the_house_allows():
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 500} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
