"""A saved adapter, and places that cannot be written to."""

from __future__ import annotations

import subprocess
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


@pytest.fixture
def mounted(tmp_path: Path):
    """Mount a small memory disk with options; skips where that needs rights that the test does not have."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a memory disk here")
        places.append(place)
        return place

    try:
        yield mount
    finally:
        for place in places:
            subprocess.run(["umount", str(place)], check=True)
