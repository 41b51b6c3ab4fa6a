"""A wheel of this project, built and unpacked: it carries what is bundled, and finds its recipes from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_wheel_carries_recipes_and_groups(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("configs", "recipes"):
        shipped = {f"peftcli/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.yaml")}
        assert shipped
        assert shipped <= names
    bundled = {f"{file.relative_to(ROOT)}" for file in (ROOT / "peftcli" / "bundled").rglob("*") if file.is_file()}
    assert "peftcli/bundled/wordnet-categories/LICENSE" in bundled
    assert bundled <= names
    assert not {name for name in names if name.startswith(("tests/", "configs/", "recipes/"))}
    code = "import peftcli; from peftcli.cli.main import app; print(peftcli.__file__); app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "config", "quickstart", "--origin"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "site/peftcli/recipes/quickstart.yaml:" in done.stdout
