"""`peft ls runs`: what lies in ./runs and how it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from filelock import FileLock


def test_runs_are_listed_with_how_they_ended(peft, trained, make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = peft("ls", "runs")
    assert (nothing.exit_code, nothing.output) == (0, "no runs in ./runs\n")
    begun = make_run()  # in ./runs
    shutil.copytree(trained("words").path, Path("runs") / "done")
    found = {row["name"]: row["about"] for row in json.loads(peft("ls", "runs", "--json").stdout)}
    assert found.keys() == {str(Path("runs") / begun.name), str(Path("runs") / "done")}
    assert found[str(Path("runs") / begun.name)].startswith("trial, unfinished, ")
    accuracy = trained("words").read_report()["quality"]["rows"][-1]["metrics"]["accuracy"]
    assert f"done, accuracy {100 * accuracy:.1f} % on test" in found[str(Path("runs") / "done")]


def test_runs_of_another_folder_and_one_under_way(peft, make_run, tmp_path, monkeypatch):
    begun = make_run()
    monkeypatch.chdir(tmp_path.parent)
    lock = FileLock(begun.path / ".lock")
    with lock:
        assert "trial, running, " in peft("ls", "runs", begun.path.parent).output
    assert "trial, unfinished, " in peft("ls", "runs", begun.path.parent).output
    assert "no runs in elsewhere" in peft("ls", "runs", "elsewhere").output
