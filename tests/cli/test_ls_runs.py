"""`peft ls runs`: what lies in ./runs and how it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def test_runs_are_listed_with_how_they_ended(peft, trained, make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert peft("ls", "runs").exit_code == 0
    begun = make_run()  # in ./runs
    shutil.copytree(trained("words").path, Path("runs") / "done")
    found = {row["name"]: row["about"] for row in json.loads(peft("ls", "runs", "--json").stdout)}
    assert found.keys() == {str(Path("runs") / begun.name), str(Path("runs") / "done")}
    assert found[str(Path("runs") / begun.name)].startswith("trial, unfinished, ")
    accuracy = trained("words").read_report()["quality"]["rows"][-1]["metrics"]["accuracy"]
    assert f"done, accuracy {100 * accuracy:.1f} % on test" in found[str(Path("runs") / "done")]
