"""`peft samples` as a person types it: what it prints, its exit codes, and that it answers at once."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def peft(tmp_path):
    """Runs `peft` with a cache of its own; returns the finished process."""
    program = "from peftcli.cli.main import main; main()"
    environment = {**os.environ, "PEFTCLI_CACHE": str(tmp_path), "COLUMNS": "100"}

    def run(*words, code=0):
        done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    return run


def put(tmp_path, name):
    folder = tmp_path / "samples" / name
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"0" * 2_000_000)
    (folder / "sample.json").write_text(json.dumps({"files": {}}))
    (folder / "complete").touch()
    return folder


def test_list(peft, tmp_path):
    put(tmp_path, "digits")
    (tmp_path / "samples/wordnet").mkdir()
    rows = {row["name"]: row for row in json.loads(peft("samples", "list", "--json").stdout)}
    assert len(rows) == 12
    assert rows["digits"]["state"] == "fetched"
    assert rows["wordnet"]["state"] == "half"
    assert rows["smollm2-135m"]["state"] == "not here"
    assert rows["smollm2-135m"]["licence"] == "Apache-2.0"
    table = peft("samples", "list").stdout
    assert "CC-BY-NC-SA-4.0" in table
    assert "2.0" in table


def test_unknown_names_exit_with_2_and_change_nothing(peft, tmp_path):
    folder = put(tmp_path, "digits")
    done = peft("samples", "remove", "digits", "smolm2-135m", code=2)
    assert "did you mean: smollm2-135m" in done.stderr
    assert "Traceback" not in done.stderr
    assert folder.is_dir()


def test_verify_of_a_changed_sample_exits_with_1(peft, tmp_path):
    put(tmp_path, "digits")
    assert "model.bin is not part of the sample" in peft("samples", "verify", code=1).stderr


def test_verify_with_nothing_here(peft):
    assert "nothing to verify" in peft("samples", "verify").stdout


def test_remove_says_what_it_removed(peft, tmp_path):
    folder = put(tmp_path, "digits")
    assert f"removed {folder} (2.0 MB)" in peft("samples", "remove", "digits").stdout
    assert not folder.exists()
    assert "nothing removed" in peft("samples", "remove", "digits").stdout


def test_fetch_of_what_is_here_says_so(peft, tmp_path):
    folder = put(tmp_path, "wordnet")
    assert f"already here, {folder}" in peft("samples", "fetch", "wordnet").stdout


def test_listing_imports_nothing_heavy():
    program = (
        "import sys, peftcli.cli.samples, peftcli.data.samples.fetch;"
        "print(*{'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'onnx'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == ""
