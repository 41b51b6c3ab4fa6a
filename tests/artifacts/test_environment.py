"""The environment: quick, plain data, and nothing that names the machine."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import time

from peftcli.artifacts import environment


def test_it_is_quick_plain_and_anonymous(tmp_path):
    start = time.perf_counter()
    found = environment.describe(tmp_path)
    assert time.perf_counter() - start < 1
    text = json.dumps(found)
    assert platform.node() not in text
    assert f"/{getpass.getuser()}" not in text
    assert found["git"] is None
    assert found["packages"]["torch"].startswith("2.")
    assert found["cpu"]["usable"] >= 1


def test_it_tells_a_changed_checkout_from_a_clean_one(tmp_path):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "one")
    below = tmp_path / "deep"
    below.mkdir()
    assert environment.git(below) == {"commit": git("rev-parse", "HEAD").strip(), "changed": False}
    (tmp_path / "a").write_text("2")
    assert environment.git(below)["changed"] is True
