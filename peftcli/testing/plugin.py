"""Hands a contract class's rows to its tests. Loaded in every pytest run, so it imports nothing but pytest."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("peftcli.testing.contract")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a class with `rows` that asks for a `row` runs once for each row that it applies to."""
    rows = getattr(metafunc.cls, "rows", None)
    if rows is None or "row" not in metafunc.fixturenames:
        return
    applies = getattr(metafunc.function, "applies", lambda row: True)
    chosen = [row for row in rows if applies(row)]
    metafunc.parametrize("row", chosen, ids=[str(row) for row in chosen])
