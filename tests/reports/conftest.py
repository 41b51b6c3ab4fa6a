"""The made-up run folder as a fixture."""

from __future__ import annotations

from pathlib import Path

import example_run
import pytest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished classification run."""
    return example_run.make(tmp_path / "run")
