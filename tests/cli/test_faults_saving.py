"""Disks that are full or read-only, and checkpoints that are gone or cut short: nothing complete is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.training import checkpoints, closing
from tests.commands import assert_said

WEIGHTS = "adapter_model.safetensors"


def fill(disk: Path) -> Path:
    """Take all the room that a disk has left, a byte at last."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(512)):
                pass
        except OSError:
            return filler
    raise AssertionError


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".old"))]


def only(disk: Path) -> RunFolder:
    [path] = run_folders(disk)
    return RunFolder.open(path)


@pytest.fixture
def reference(undisturbed):
    """The adapter's bytes of a run that nothing happened to."""
    return (undisturbed.adapter / WEIGHTS).read_bytes()


@pytest.fixture
def full_at(monkeypatch, mounted):
    """`full_at(owner, name, at)` is a disk that is full when a function is called for the time `at`."""

    def make(owner, name: str, at: int = 1) -> Path:
        disk, former, calls = mounted("size=8m"), getattr(owner, name), []

        def filling(*args, **kwargs):
            calls.append(name)
            if len(calls) == at:
                fill(disk)
            return former(*args, **kwargs)

        monkeypatch.setattr(owner, name, filling)
        return disk

    return make


@pytest.mark.parametrize(
    ("owner", "name", "at", "left"),
    [
        pytest.param(checkpoints, "save", 1, 0, id="the first checkpoint"),
        pytest.param(checkpoints, "save", 2, 1, id="the second checkpoint"),
        pytest.param(RunFolder, "log", 4, 2, id="a line of the log"),
        pytest.param(closing, "save", 1, 4, id="the adapter"),
        pytest.param(RunFolder, "write_report", 1, 4, id="the report"),
    ],
)
def test_a_full_disk_loses_nothing_and_the_run_goes_on(peft, recipe, full_at, reference, owner, name, at, left):
    disk = full_at(owner, name, at)
    result = peft("train", recipe, f"output={disk}")
    assert_said(result, 1, "failed: disk-full: could not write", "bytes are free in", "peft train --resume")
    run = only(disk)
    found = checkpoints.latest(run.checkpoints)
    assert (found.progress.step if found else 0) == left
    assert unfinished(run.path) == []
    assert run.adapter.exists() == (name == "write_report")
    (disk / "filler").unlink()
    assert_said(peft("train", "--resume", run.path), 0)
    assert run.status == "done"
    assert (run.adapter / WEIGHTS).read_bytes() == reference


def test_no_room_for_a_run_at_all(peft, recipe, mounted):
    disk = mounted("size=64k")
    fill(disk)
    assert_said(peft("train", recipe, f"output={disk}"), 1, "failed: disk-full")
    assert run_folders(disk) == []


def test_a_page_that_had_no_room_is_written_later(peft, recipe, mounted, monkeypatch):
    from peftcli.reports import page

    disk, former = mounted("size=8m"), page.write

    def write(run):
        fill(disk)
        return former(run)

    with monkeypatch.context() as patch:
        patch.setattr(page, "write", write)
        assert_said(peft("train", recipe, f"output={disk}"), 1, "failed: disk-full", "report.html")
    (disk / "filler").unlink()
    assert_said(peft("train", "--resume", only(disk).path), 0)
    assert only(disk).status == "done"
    assert only(disk).page.is_file()


def test_files_that_may_not_grow_are_a_full_disk_too(start, recipe, peft, tmp_path, reference):
    """What needs no right to mount: the process may write no file above a size, so that no checkpoint fits."""
    command = start("train", recipe, largest=2500)
    assert_said(command, 1, "failed: disk-full", ".safetensors", "file too large")
    run = only(tmp_path / "runs")
    assert checkpoints.complete(run.checkpoints) == unfinished(run.path) == []
    assert_said(peft("train", "--resume", run.path), 0)
    assert (run.adapter / WEIGHTS).read_bytes() == reference


def test_a_run_on_a_disk_that_became_read_only(peft, recipe, mounted, full_at, reference):
    disk = full_at(closing, "save")
    assert_said(peft("train", recipe, f"output={disk}"), 1, "disk-full")
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    run = only(disk)
    assert_said(peft("train", "--resume", run.path), 2, "mistake: cannot write", "read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert_said(peft("train", "--resume", run.path), 0)
    assert (run.adapter / WEIGHTS).read_bytes() == reference


def break_off(peft, recipe, tmp_path, monkeypatch, at: int = 2) -> RunFolder:
    """A run that lost its disk at a checkpoint, with those before it in place."""
    former, calls = checkpoints.save, []

    def save(root, checkpoint):
        calls.append(root)
        if len(calls) == at:
            raise KeyboardInterrupt
        return former(root, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        assert_said(peft("train", recipe, "training.save_every=1", "training.keep_checkpoints=9"), 130)
    return only(tmp_path / "runs")


FILES = ("trained.safetensors", "optimiser.safetensors", "method.safetensors", "progress.json")


def test_a_checkpoint_cut_short_is_named_and_the_one_before_it_serves(peft, recipe, tmp_path, monkeypatch, reference):
    run = break_off(peft, recipe, tmp_path, monkeypatch, at=4)
    newest = checkpoints.complete(run.checkpoints)[-1]
    for file, length in [(name, length) for name in FILES for length in (None, 0, -3)]:
        whole = (newest / file).read_bytes()
        (newest / file).unlink()
        if length is not None:
            (newest / file).write_bytes(whole[:length])
        result = peft("train", "--resume", run.path)
        assert_said(result, 1, f"failed: broken-checkpoint: {newest} cannot be read", "remove that folder", "--resume")
        (newest / file).write_bytes(whole)
    (newest / file).unlink()
    shutil.rmtree(newest)
    assert_said(peft("train", "--resume", run.path), 0, "continuing after step 2")
    assert (run.adapter / WEIGHTS).read_bytes() == reference


def test_without_any_checkpoint_a_run_starts_over_and_says_so(peft, recipe, tmp_path, monkeypatch, reference):
    run = break_off(peft, recipe, tmp_path, monkeypatch)
    shutil.rmtree(run.checkpoints)
    result = peft("train", "--resume", run.path)
    assert_said(result, 0, f"{run.checkpoints} holds no complete checkpoint: starting at the first step")
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2, 3, 4]
    assert (run.adapter / WEIGHTS).read_bytes() == reference


def test_without_its_best_checkpoint_a_run_ends_with_its_last_step_and_says_so(peft, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(closing, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        given = ["training.eval_every=1", "optim.lr=1", "task.best_metric=loss"]
        assert_said(peft("train", recipe, *given), 130)
    run = only(tmp_path / "runs")
    newest = checkpoints.latest(run.checkpoints).progress
    assert newest.best_step < newest.step
    shutil.rmtree(checkpoints.folder_of(run.checkpoints, newest.best_step))
    result = peft("train", "--resume", run.path)
    assert_said(result, 0, f"step-{newest.best_step:08d}, is gone: the last step is kept")


def test_other_rows_than_those_it_began_with_stop_a_resumed_run(peft, recipe, rows, tmp_path, monkeypatch):
    own = tmp_path / "train.jsonl"
    lines = Path(rows["train"]).read_text().splitlines(keepends=True)
    own.write_text("".join(lines))
    recipe.write_text(recipe.read_text().replace(rows["train"], str(own)))
    run = break_off(peft, recipe, tmp_path, monkeypatch)
    kept = run.metrics_file.read_bytes()
    own.write_text("".join(lines[:-1]))
    for _ in range(2):  # the first refusal must not make the new rows the known ones
        result = peft("train", "--resume", run.path)
        assert_said(result, 1, "failed: data-changed", "put the former rows back")
        assert run.metrics_file.read_bytes() == kept
    own.write_text("".join(lines))
    assert_said(peft("train", "--resume", run.path), 0, "continuing after step 1")
    assert json.loads(run.environment.read_text())["data_fingerprint"]


def test_new_rows_are_fine_where_nothing_was_trained_on_the_old_ones(peft, recipe, rows, tmp_path, monkeypatch):
    own = tmp_path / "train.jsonl"
    own.write_text(Path(rows["train"]).read_text())
    recipe.write_text(recipe.read_text().replace(rows["train"], str(own)))
    run = break_off(peft, recipe, tmp_path, monkeypatch, at=1)
    own.write_text(Path(rows["test"]).read_text())
    assert_said(peft("train", "--resume", run.path), 0)


def test_a_finished_run_is_not_trained_again(peft, trained):
    run = trained("words")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert_said(peft("train", "--resume", run.path), 0, "is already done", "report.html")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_what_is_no_run_folder_cannot_be_resumed(peft, trained, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_said(peft("train", "--resume", tmp_path / "empty"), 2, "is not a run folder: it has no config.yaml")
    assert_said(peft("train", "--resume", tmp_path / "gone"), 2, "is not a run folder: there is no such folder")
    inside = trained("words").adapter
    assert_said(peft("train", "--resume", inside), 2, "is not a run folder", str(trained("words").path))


def test_a_resumed_run_takes_no_overrides(peft, trained, recipe):
    run = trained("words").path
    for given in (["optim.lr=1"], [recipe, "optim.lr=1"]):
        assert_said(peft("train", "--resume", run, *given), 2, "recipe", "--resume")
    assert_said(peft("train"), 2, "name either a recipe")


def test_a_damaged_config_or_report_of_a_run_is_named(peft, trained, tmp_path):
    run = shutil.copytree(trained("words").path, tmp_path / "run")
    (run / "report.json").write_text('{"run": ')
    assert_said(peft("train", "--resume", run), 1, "failed: damaged-file", str(run / "report.json"))
    (run / "report.json").unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text()[:100])
    assert_said(peft("train", "--resume", run), 2, str(run / "config.yaml"))
