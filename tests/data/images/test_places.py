"""Pictures in folders, beside the file that names them, and in the rows themselves."""

from __future__ import annotations

import os
import shutil
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig
from peftcli.data import sources
from tests import pictures

NEEDED = ["image", "label"]


@pytest.fixture
def folder(tmp_path):
    return pictures.make_folder(tmp_path / "set", {"good": 6, "bad": 4})


def load(train, **more):
    return sources.load(DataConfig(source="files", files={"train": str(train)}, validation_share=0, **more), NEEDED)


def test_sub_folders_are_classes(folder) -> None:
    (folder / "bad" / "deeper").mkdir()
    (folder / "bad" / "000.png").rename(folder / "bad" / "deeper" / "x.PNG")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "bad" / ".hidden.png").write_bytes(b"")
    (folder / "empty").mkdir()
    splits = load(folder)
    rows = splits.train
    assert sorted(rows["label"]) == ["bad"] * 4 + ["good"] * 6
    assert {picture["path"] for picture in rows["image"]} >= {"bad/deeper/x.PNG", "good/005.png"}
    assert any("no pictures in empty" in note for note in splits.notes)
    assert any("notes.txt" in note for note in splits.notes)


def test_links_are_followed_and_end_nowhere(folder, tmp_path) -> None:
    elsewhere = pictures.make_folder(tmp_path / "elsewhere", {"bad": 3}, first=50)
    (folder / "bad" / "more").symlink_to(elsewhere / "bad")
    (folder / "worse").symlink_to(elsewhere)
    (folder / "bad" / "round").symlink_to(folder)
    rows = load(folder).train
    assert Counter(rows["label"]) == {"good": 6, "bad": 4 + 3 + 6 + 3, "worse": 3}


def test_what_cannot_be_a_row_is_named(folder) -> None:
    (folder / "bad" / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "bad" / "pipe.png")
    (folder / "bad" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    with pytest.raises(UserError) as refused:
        load(folder)
    assert "3 of 13 rows" in str(refused.value)
    for words in (r"caf\xe9.png: picture has a name that is no UTF-8", "gone.png: picture cannot", "pipe.png: picture"):
        assert words in str(refused.value)
    splits = load(folder, bad_rows="skip")
    assert [splits.train["row"][i] for i in (3, 4)] == [3, 7]  # the places of the bad ones stay theirs
    for file in folder.rglob("[0-9]*.png"):
        file.rename(file.with_name(os.fsdecode(b"\xff" + file.name.encode())))
    with pytest.raises(UserError, match="no row of train can be used"):
        load(folder, bad_rows="skip")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_listing_names_pictures_from_its_own_folder(folder, name, monkeypatch, tmp_path) -> None:
    listing = pictures.make_listing(folder, name)
    monkeypatch.chdir(tmp_path)
    rows = load(listing).train
    assert len(rows) == 10
    assert rows[0]["image"]["file"] == str(folder / rows[0]["image"]["path"])


def test_parquet_holds_bytes_structs_or_paths(folder) -> None:
    files = sorted(folder.rglob("*.png"))
    labels = [file.parent.name for file in files]
    for name, images in {
        "bytes": [file.read_bytes() for file in files],
        "struct": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
        "path": [str(file.relative_to(folder)) for file in files],
    }.items():
        parquet.write_table(pa.table({"image": images, "label": labels}), folder / f"{name}.parquet")
        first = load(folder / f"{name}.parquet").train[0]["image"]
        assert (first["bytes"] or b"") in (b"", files[0].read_bytes())
        assert first["bytes"] or first["file"] == str(files[0])


def test_the_fingerprint_knows_contents_but_no_places(folder, tmp_path) -> None:
    before = load(folder).fingerprint
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").fingerprint == before
    shutil.copy(folder / "bad" / "000.png", tmp_path / "elsewhere" / "good" / "000.png")
    assert load(tmp_path / "elsewhere").fingerprint != before


def test_a_missing_picture_is_named_or_left_out(folder) -> None:
    listing = pictures.make_listing(folder)
    (folder / "good" / "003.png").unlink()
    with pytest.raises(UserError, match=r"good/003\.png: picture cannot be read: No such file"):
        load(listing)
    splits = load(listing, bad_rows="skip")
    assert len(splits.train) == 9
    assert any("left out 1 of 10 rows" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: (folder / "good").rename(folder / "train") and (folder / "bad").rename(folder / "test"),
            "splits",
        ),
        (lambda folder: [shutil.rmtree(folder / name) for name in ("good", "bad")], "no sub-folder with pictures"),
    ],
    ids=["splits", "empty"],
)
def test_a_folder_that_is_no_set_of_classes(folder, spoil, words) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=words):
        load(folder)


def test_a_column_that_holds_no_pictures(tmp_path) -> None:
    parquet.write_table(pa.table({"image": [1, 2], "label": ["a", "b"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="column of pictures holds int64"):
        load(tmp_path / "rows.parquet")
