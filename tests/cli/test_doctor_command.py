"""`peft doctor`: what it finds on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import socket
import sys
from importlib import metadata

import pytest
from typer.testing import CliRunner

from peftcli.cli.main import app


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def look(*args: str, code: int = 0) -> dict[str, dict[str, str]]:
    done = CliRunner().invoke(app, ["doctor", "--json", *args])
    assert done.exit_code == code, done.output
    return {row["about"]: row for row in json.loads(done.stdout)}


def test_this_machine_can_train(tmp_path) -> None:
    found = look()
    assert {row["state"] for row in found.values()} <= {"ok", "note"}
    assert found["torch"]["what"] == metadata.version("torch")
    assert "training.precision=auto takes" in found["cpu"]["what"]
    assert found["samples"]["state"] == "note"
    assert "not asked" in found["network"]["what"]
    assert not list(tmp_path.iterdir())


def test_a_version_out_of_range_is_a_problem(monkeypatch) -> None:
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "peft" else true(name))
    row = look(code=1)["peft"]
    assert (row["state"], row["do"][:11]) == ("problem", "pip install")


def test_a_missing_package_is_a_problem(monkeypatch) -> None:
    true = metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(metadata, "version", version)
    assert look(code=1)["gguf"]["what"] == "is not installed"


def test_a_cache_that_is_a_file_is_a_problem(monkeypatch, tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "taken"))
    assert "PEFTCLI_CACHE" in look(code=1)["cache"]["do"]


def test_threads_that_the_environment_sets_are_a_note(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert look()["threads"]["state"] == "note"


def test_asked_for_the_network_it_says_that_there_is_none() -> None:
    row = look("--network")["network"]
    assert row["state"] == "note"
    assert "model.source=bundled, sample and folder" in row["do"]


def test_words_for_a_person() -> None:
    said = CliRunner().invoke(app, ["doctor"]).stdout
    assert "transformers" in said
    assert max(map(len, said.splitlines())) <= 120


def test_it_says_whether_bases_can_be_held_in_few_bits(monkeypatch) -> None:
    pytest.importorskip("bitsandbytes")
    assert "nf4 and int8 run on" in look()["quantization"]["what"]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert look()["quantization"]["do"] == "pip install 'peftcli[quantized]'"
