"""The old file or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from peftcli.artifacts import atomic
from peftcli.config.errors import CheckFailed, UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_and_die(folder: Path) -> None:
    with atomic.folder(folder) as partial:
        (partial / "a").write_text("new")
        raise RuntimeError


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_stopped_before_the_rename_leaves_the_old_file(tmp_path, monkeypatch, broken):
    atomic.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, broken, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        atomic.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_stopped_inside_leaves_the_old_folder(tmp_path):
    with atomic.folder(tmp_path / "f") as partial:
        (partial / "a").write_text("old")
    with pytest.raises(RuntimeError):
        write_and_die(tmp_path / "f")
    assert (tmp_path / "f/a").read_text() == "old"
    assert names(tmp_path) == {"f"}


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path, monkeypatch):
    with atomic.folder(tmp_path / "f") as partial:
        (partial / "a").write_text("old")
    real = os.replace

    def fail(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckFailed, match="write-failed") as failed, atomic.folder(tmp_path / "f") as partial:
        Path(partial / "a").touch()
    assert failed.value.check == "write-failed"
    assert (tmp_path / "f/a").read_text() == "old"
    assert names(tmp_path) == {"f"}


def test_a_kill_between_the_two_renames_is_mended_by_the_next_write(tmp_path):
    (tmp_path / ".f.old").mkdir()
    (tmp_path / ".f.old/a").write_text("old")
    (tmp_path / ".f.partial").mkdir()
    with pytest.raises(RuntimeError):
        write_and_die(tmp_path / "f")
    assert (tmp_path / "f/a").read_text() == "old"
    with atomic.folder(tmp_path / "f") as partial:
        (partial / "b").touch()
    assert names(tmp_path) == {"f"}
    assert names(tmp_path / "f") == {"b"}


def test_a_full_disk_is_named_and_loses_nothing(mounted):
    disk = mounted("size=64k")
    atomic.write_text(disk / "adapter/old.txt", "old")
    tensors = {"a": torch.ones(50_000)}
    with pytest.raises(CheckFailed, match=r"(?s)disk-full.*a\.safetensors \(200,000 bytes\).*no space.*bytes are free"):
        atomic.write_tensors(disk / "a.safetensors", tensors)
    with pytest.raises(CheckFailed, match="disk-full") as failed, atomic.folder(disk / "adapter") as partial:
        atomic.write_tensors(partial / "a.safetensors", tensors)
    assert f"{disk}/adapter/a.safetensors" in str(failed.value)
    with pytest.raises(CheckFailed, match="disk-full"):
        atomic.write_bytes(disk / "b", b"b" * 200_000)
    assert names(disk) == {"adapter"}
    assert (disk / "adapter/old.txt").read_text() == "old"


def test_places_that_cannot_be_written_are_the_users_mistake(tmp_path, mounted):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/below", mounted("ro,size=64k") / "a"):
        with pytest.raises(UserError, match=f"cannot write {place}"):
            atomic.write_text(place, "x")
        with pytest.raises(UserError, match="cannot write"), atomic.folder(place):
            pass


def test_tensors_and_json_read_back(tmp_path):
    from safetensors.torch import load_file

    tensor = torch.arange(6.0).reshape(2, 3).t()
    atomic.write_tensors(tmp_path / "t.safetensors", {"t": tensor})
    assert torch.equal(load_file(tmp_path / "t.safetensors")["t"], tensor)
    (tmp_path / "plain").touch()
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    atomic.write_json(tmp_path / "v.json", {"ü": [1, None]})
    assert (tmp_path / "v.json").read_text() == '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'
