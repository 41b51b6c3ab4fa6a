"""The line under each field of a settings class: the one source of help, tables and schema descriptions."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path


def describe(settings: type) -> dict[str, str]:
    """What each field of a dataclass means, read from the string below it; inherited fields included."""
    found: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):
        found |= _of_file(Path(inspect.getfile(cls))).get(cls.__qualname__, {})
    return found


@cache
def _of_file(file: Path) -> dict[str, dict[str, str]]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: _of_class(node) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _of_class(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        match below:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found[statement.target.id] = " ".join(text.split())
    return found
