"""The README's table of methods and families is what the tests' rows make of it today."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = util.spec_from_file_location("support_table", ROOT / "scripts" / "support_table.py")
    module = util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_readme_is_up_to_date(script) -> None:
    page = ROOT / "README.md"
    assert script.update(page) == page.read_text(encoding="utf-8"), "run: python scripts/support_table.py"


def test_every_method_has_a_line_and_every_pair_is_decided(script) -> None:
    from peftcli.config import catalog
    from peftcli.methods import registry

    inside = {name for name, module in catalog.methods().items() if module.startswith("peftcli.")}
    assert set(script.METHODS) == {name for name in inside if registry.find(name).capabilities.trains}
    assert script.UNTESTED not in script.table()


def test_a_pair_without_a_row_is_tried_and_its_refusal_told(script, monkeypatch) -> None:
    monkeypatch.setattr(script, "rows", list)
    monkeypatch.setattr(script, "METHODS", ("sdt",))
    lines = script.table().splitlines()
    assert r"| `sdt` | not tested | no \* | no \* | no \* |" in lines
    assert r"\* method=sdt needs a state-space model." in lines
