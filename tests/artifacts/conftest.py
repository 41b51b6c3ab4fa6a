"""A saved adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import adapted, lineage_of, tiny

from peftcli.artifacts import adapter


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter's folder."""
    model = adapted(tiny())
    adapter.save(model, tmp_path / "adapter", lineage_of(model), {"tuned": {"accuracy": 0.75}})
    return tmp_path / "adapter"
