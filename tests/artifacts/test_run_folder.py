"""The run folder: its name, its log through kills and full disks, and messages that lead to the right folder."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import run_config

from peftcli.artifacts import run_folder
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import ModelConfig
from peftcli.data.formats import find
from peftcli.methods.kpsvd.settings import Settings as Kpsvd


def filled(run: RunFolder, steps: int) -> RunFolder:
    for step in range(1, steps + 1):
        run.log({"step": step, "loss": 1 / 3 / step, "note": "ü"})
    return run


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    config = run_config(tmp_path / "deep/runs", name="smollm2/r8_lora")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunFolder.create(config, ["a=1", "b=[1, 2]"]), range(16)))
    assert len({run.path for run in runs}) == 16
    assert all("_smollm2-r8_lora" in run.name for run in runs)
    assert runs[0].overrides.read_text() == "a=1\nb=[1, 2]\n"
    assert runs[0].status == "unfinished"
    assert f"output: {tmp_path}/deep/runs" in runs[0].config.read_text()
    assert RunFolder.open(runs[0].path) == runs[0]


def test_a_run_finds_its_files_and_its_model_from_any_other_folder(tmp_path, monkeypatch):
    start = tmp_path / "one [1]"
    (start / "rows").mkdir(parents=True)
    for name in ("rows/a.jsonl", "rows/b.jsonl", "c[d].jsonl"):
        (start / name).write_text('{"text": "a"}\n')
    monkeypatch.chdir(start)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = run_config()
    config.data.files = {"train": ["rows/*.jsonl", str(start / "rows/a.jsonl")], "test": "c[d].jsonl"}
    config.data.files["validation"] = "~/one [1]/c[d].jsonl"
    config.model = ModelConfig("../base", "folder")
    run = RunFolder.create(config)
    assert (config.model.name, config.data.files["test"]) == ("../base", "c[d].jsonl")
    monkeypatch.chdir(tmp_path)
    kept = frozen.load(start / run.config)
    assert find(kept.data.files["train"][0], "train") == [start / "rows/a.jsonl", start / "rows/b.jsonl"]
    assert kept.data.files["train"][1] == str(start / "rows/a.jsonl")
    assert kept.data.files["test"] == kept.data.files["validation"] == str(start / "c[d].jsonl")
    assert Path(kept.model.name).resolve() == tmp_path / "base"
    assert frozen.anchored(kept) == kept
    tuned = replace(run_config(), method=Kpsvd(source="delta", tuned="runs/full/model"))
    assert frozen.anchored(tuned).method.tuned == str(tmp_path / "runs/full/model")
    assert frozen.anchored(run_config()).model.name == "tiny"


def test_a_folder_whose_config_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckFailed, match="disk-full"):
        RunFolder.create(run_config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_the_users_mistake(tmp_path, mounted):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/runs", mounted("ro,size=64k") / "runs"):
        with pytest.raises(UserError, match=f"cannot write {output}.*\n.*output=FOLDER"):
            RunFolder.create(run_config(output))


def test_a_run_folder_that_became_read_only_says_so_and_keeps_its_rows(mounted):
    disk = mounted("size=256k")
    run = filled(RunFolder.create(run_config(disk)), 2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: read-only"):
        run.log({"step": 3})
    with pytest.raises(UserError, match=r"cannot write .*report.json: read-only"):
        run.write_report({})
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_full_disk_leaves_no_half_row(mounted):
    run = filled(RunFolder.create(run_config(mounted("size=64k"))), 2)
    before = run.metrics_file.read_bytes()
    with pytest.raises(CheckFailed, match="disk-full"):
        run.log({"step": 3, "text": "x" * 200_000})
    assert run.metrics_file.read_bytes() == before
    run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_opening_something_else_names_the_closest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(run_config("runs", name="quickstart"))
    with pytest.raises(UserError, match="there is no such folder") as failed:
        RunFolder.open(f"runs/{run.name}s")
    assert failed.value.mistakes[0].nearest == f"runs/{run.name}"
    run.adapter.mkdir()
    with pytest.raises(UserError, match=r"has no config.yaml") as failed:
        RunFolder.open(run.adapter)
    assert failed.value.mistakes[0].nearest == str(run.path.absolute())
    with pytest.raises(UserError) as failed:
        RunFolder.open("nowhere/at/all")
    assert failed.value.mistakes[0].allowed == (f"runs/{run.name}",)
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="peft train RECIPE"):
        RunFolder.open(tmp_path / "empty/x")


@pytest.mark.parametrize("tail", [b'{"step": 4, "lo', '{"step": 4, "note": "ü'.encode()[:-1], b'{"step": 4}', b"\xff"])
def test_cut_drops_later_rows_and_a_torn_line_and_keeps_the_rest_byte_for_byte(tmp_path, tail):
    run = filled(RunFolder.create(run_config(tmp_path)), 3)
    whole = run.metrics_file.read_bytes().splitlines(keepends=True)
    with open(run.metrics_file, "ab") as stream:
        stream.write(tail)
    assert [row["step"] for row in run.metrics()][:3] == [1, 2, 3]
    run.cut(3)
    assert run.metrics_file.read_bytes() == b"".join(whole)
    run.cut(2)
    assert run.metrics_file.read_bytes() == b"".join(whole[:2])
    run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_damage_in_the_middle_is_not_read_over(tmp_path):
    run = RunFolder.create(run_config(tmp_path))
    run.metrics_file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(CheckFailed, match=r"metrics.jsonl:2: not JSON"):
        run.metrics()


def test_the_report_is_whole_or_absent(tmp_path):
    run = RunFolder.create(run_config(tmp_path))
    with pytest.raises(UserError, match=r"no report yet.*\n.*--resume"):
        run.read_report()
    run.write_report({"run": {"status": "done"}})
    assert run.status == "done"
    run.report.write_text("{")
    with pytest.raises(CheckFailed, match="damaged-file"):
        run.read_report()


def test_cut_of_a_run_without_a_log_does_nothing(tmp_path):
    run = RunFolder.create(run_config(tmp_path))
    run.cut(5)
    assert not run.metrics_file.exists()
    assert run_folder.run_folders(tmp_path) == [run.path]


def test_making_a_run_folder_imports_no_machine_learning_library():
    code = "import peftcli.artifacts.run_folder, sys, json; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torch", "transformers", "peft", "datasets", "numpy"} & set(loaded)
