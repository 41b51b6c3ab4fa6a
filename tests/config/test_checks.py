"""Every check that can stop a run is documented, and every documented one can."""

from __future__ import annotations

import ast
from pathlib import Path

import peftcli
from peftcli.config.checks import CHECKS

MISTAKES = {"unknown-key"}
"""A name of the table that is no CheckFailed: the composed tree's unknown keys are the user's mistakes, exit code 2."""


def raised() -> dict[str, str]:
    """The name in each `CheckFailed("name", ...)` of the program, and where it stands."""
    found = {}
    for file in Path(peftcli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CheckFailed"):
                continue
            if any(keyword.arg is None for keyword in node.keywords):
                continue  # one that a worker process left is raised again
            name, place = node.args[0], f"{file}:{node.lineno}"
            assert isinstance(name, ast.Constant), f"{place}: the name of a check is written out"
            found[name.value] = place
    return found


def test_every_check_that_is_raised_is_documented():
    assert {name: place for name, place in raised().items() if name not in CHECKS} == {}


def test_every_documented_check_can_be_raised():
    assert set(CHECKS) - set(raised()) == MISTAKES


def test_each_is_explained_by_one_plain_sentence():
    for name, sentence in CHECKS.items():
        assert name == name.lower().replace(" ", "-")
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert len(sentence) < 120
