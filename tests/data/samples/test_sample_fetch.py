"""From an archive to a folder: whole or not at all, once, and only if it is the archive that was pinned."""

import dataclasses
import json
import os
import threading
import time

import pytest

from peftcli.config import paths
from peftcli.config.errors import CheckFailed, UserError
from peftcli.data.samples import catalog, fetch, store


def visible(cache):
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) if cache.is_dir() else []


def test_a_sample_is_built_recorded_and_found(sample, archives, cache):
    lines = []
    assert fetch.ensure(["tiny"], archives, lines.append) == [cache / "tiny"]
    assert paths.sample_folder("tiny") == cache / "tiny"
    assert (cache / "tiny/a.txt").read_text() == "WORDS"
    record = json.loads((cache / "tiny/sample.json").read_text())
    assert record["origin"]["archive_sha256"] == sample.sha256
    assert record["licence"] == "CC0-1.0"
    assert record["files"]["a.txt"] == {"bytes": 5, "sha256": store.sha256(cache / "tiny/a.txt")}
    assert record["note"] == "upper case"
    told = "\n".join(lines)
    assert "licence: CC0-1.0" in told
    assert "tiny 1.0 (pip)" in told
    assert visible(cache) == ["tiny"]
    assert store.verify("tiny") == 1


def test_what_is_there_is_not_fetched_again(sample, archives, conversions):
    fetch.ensure(["tiny"], archives)
    conversions["tiny"] = lambda source, out: pytest.fail("converted again")
    lines = []
    fetch.ensure(["tiny"], archives, lines.append)
    assert lines == []


def test_another_archive_is_not_opened(sample, archives, cache, monkeypatch):
    wrong = next(archives.iterdir())
    monkeypatch.setattr(fetch, "download", lambda *_: wrong)
    monkeypatch.setitem(catalog.BY_NAME, "tiny", dataclasses.replace(sample, sha256="0" * 64))
    monkeypatch.setattr(fetch, "unpack", lambda *_: pytest.fail("opened"))
    with pytest.raises(CheckFailed, match=f"sample-hash.*{sample.sha256}.*{'0' * 64}"):
        fetch.ensure(["tiny"])
    assert visible(cache) == []


def test_no_archive_of_that_hash_in_the_folder(sample, tmp_path):
    with pytest.raises(UserError, match=rf"no file in .*\n.*SHA-256 {sample.sha256}") as caught:
        fetch.ensure(["tiny"], tmp_path / "nowhere")
    assert "tiny 1.0" in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckFailed("x", "y"), RuntimeError])
def test_interrupted_conversion_leaves_nothing(sample, archives, cache, conversions, error):
    def stopped(source, out):
        (out / "half.bin").write_bytes(b"half")
        raise error

    conversions["tiny"] = stopped
    with pytest.raises(error if isinstance(error, type) else type(error)):
        fetch.ensure(["tiny"], archives)
    assert visible(cache) == []
    conversions.clear()
    fetch.ensure(["tiny"], archives)
    assert visible(cache) == ["tiny"]


def test_leavings_of_a_killed_fetch_are_cleared(sample, archives, cache):
    (cache / ".tiny.tmp-killed").mkdir(parents=True)
    (cache / "tiny").mkdir()  # a folder without its marker is not a sample
    (cache / "tiny/half.bin").touch()
    fetch.ensure(["tiny"], archives)
    assert visible(cache) == ["tiny"]
    assert not (cache / "tiny/half.bin").exists()


def test_two_fetches_at_once_are_one(sample, archives, conversions):
    count = []

    def slow(source, out):
        count.append(1)
        time.sleep(0.3)
        (out / "a.txt").touch()
        return {}

    conversions["tiny"] = slow
    lines: list[str] = []
    threads = [threading.Thread(target=fetch.ensure, args=(["tiny"], archives, lines.append)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert store.present("tiny")
    assert any("another process" in line for line in lines)


def test_all_names_are_looked_up_before_anything_is_fetched(sample, archives, cache):
    with pytest.raises(UserError, match="did you mean: wordnet"):
        fetch.ensure(["tiny", "wordnets"], archives)
    assert visible(cache) == []


def test_a_missing_module_is_told_before_the_download(sample, archives, monkeypatch, cache):
    monkeypatch.setitem(catalog.BY_NAME, "tiny", dataclasses.replace(sample, needs="no_such_module"))
    with pytest.raises(UserError, match=r'no_such_module.*\n.*pip install "peftcli\[samples\]"'):
        fetch.ensure(["tiny"], archives)
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written(sample, archives, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="PEFTCLI_CACHE=FOLDER"):
        fetch.ensure(["tiny"], archives)


def test_installed_files_save_the_download_if_they_are_the_same(sample, tmp_path, cache, monkeypatch):
    folder = tmp_path / "share"
    folder.mkdir()
    (folder / "a.txt").write_text("words")
    monkeypatch.setattr(fetch, "download", lambda *_: pytest.fail("downloaded"))
    row = dataclasses.replace(sample, installed=str(folder), member_sha256={"a.txt": store.sha256(folder / "a.txt")})
    monkeypatch.setitem(catalog.BY_NAME, "tiny", row)
    fetch.ensure(["tiny"])
    assert store.record("tiny")["origin"]["installed"] == str(folder)
    store.remove("tiny")
    (folder / "a.txt").write_text("other")
    with pytest.raises(pytest.fail.Exception, match="downloaded"):
        fetch.ensure(["tiny"])


def test_verify_finds_every_kind_of_change(sample, archives, cache):
    fetch.ensure(["tiny"], archives)
    (cache / "tiny/a.txt").write_text("WORDZ")
    (cache / "tiny/b.txt").touch()
    with pytest.raises(CheckFailed, match=r"b.txt is not part of the sample; a.txt has changed\n.*samples fetch tiny"):
        store.verify("tiny")
    os.remove(cache / "tiny/a.txt")
    with pytest.raises(CheckFailed, match=r"a.txt is missing"):
        store.verify("tiny")
    (cache / "tiny/sample.json").write_text("{")
    with pytest.raises(CheckFailed, match=r"sample.json is unreadable"):
        store.verify("tiny")


@pytest.mark.parametrize("mode", [0o600, 0o444])
def test_files_are_readable_by_all_who_share_the_cache(sample, archives, cache, conversions, mode):
    def private(source, out):
        (out / "model.bin").touch()
        (out / "model.bin").chmod(mode)
        return {}

    conversions["tiny"] = private
    fetch.ensure(["tiny"], archives)
    assert (cache / "tiny/model.bin").stat().st_mode & 0o777 == 0o644


def test_verify_of_what_is_not_here_names_the_command():
    with pytest.raises(UserError, match="peft samples fetch wordnet"):
        store.verify("wordnet")


def test_remove_says_what_is_gone(sample, archives, cache):
    fetch.ensure(["tiny"], archives)
    folder, size = store.remove("tiny")
    assert (folder, size > 5) == (cache / "tiny", True)
    assert visible(cache) == []
    assert store.remove("tiny") is None
