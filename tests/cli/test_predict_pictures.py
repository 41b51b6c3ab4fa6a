"""`peft` on pictures: trained by the command, asked about folders, listings and single files, and about bad ones."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import pictures
from tests.commands import assert_said

RECIPE = """\
defaults:
  - method: lora
  - task: images
  - data: imagefolder
model: {{name: {model}, source: folder}}
method: {{r: 2}}
optim: {{lr: 0.02}}
training: {{max_steps: 8, batch_size: 6, eval_every: end, precision: fp32}}
launch: {{device: cpu, threads: 1}}
name: spots
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a recipe, its model and its pictures."""
    folder = tmp_path_factory.mktemp("spots")
    pictures.make_folder(folder / "pictures", {"good": 14, "bad": 10})
    pictures.make_folder(folder / "new", {"good": 5, "bad": 4}, first=700)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=pictures.make_checkpoint(folder / "vit")))
    return folder


@pytest.fixture(scope="module")
def finished(place) -> Path:
    from typer.testing import CliRunner

    from peftcli.cli.main import app

    arguments = ["train", f"{place}/recipe.yaml", f"data.files.train={place}/pictures", f"output={place}/runs"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [run] = (place / "runs").glob("*_spots")
    return run


def test_a_folder_is_answered_picture_by_picture(peft, place, finished, tmp_path) -> None:
    result = peft("predict", finished, "--input", place / "new", "--output", tmp_path / "out.csv")
    assert_said(result, 0, "9 rows answered", "pictures/s", "ms for a batch of 16")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["image"] for row in rows] == [f"bad/{700 + i}.png" for i in range(4)] + [
        f"good/{700 + i}.png" for i in range(5)
    ]
    for row in rows:
        assert max(float(row["probability of good"]), float(row["probability of bad"])) == float(row["score"])


def test_a_listing_keeps_its_columns_and_one_picture_may_be_asked_about(peft, place, finished, tmp_path) -> None:
    listing = pictures.make_listing(place / "new", "rows.jsonl")
    folder, rows, one = (
        json.loads(peft("predict", finished, "--input", path, "--json").stdout)
        for path in (place / "new", listing, place / "new/good/701.png")
    )
    assert [row["label"] for row in rows["predictions"]] == ["bad"] * 4 + ["good"] * 5
    assert [row["score"] for row in rows["predictions"]] == [row["score"] for row in folder["predictions"]]
    assert one["predictions"][0]["image"] == "701.png"
    assert one["pace"]["pictures"] == 1


def test_a_merged_model_answers_alike(peft, place, finished, tmp_path) -> None:
    assert_said(peft("merge", finished, "--to", tmp_path / "merged"), 0, "merged")
    before, after = (
        json.loads(peft("predict", path, "--input", place / "new", "--json").stdout)["predictions"]
        for path in (finished, tmp_path / "merged")
    )
    assert [row["score"] for row in after] == pytest.approx([row["score"] for row in before], abs=1e-4)


def test_a_bad_picture_is_named_or_left_out(peft, place, finished, tmp_path) -> None:
    folder = pictures.make_folder(tmp_path / "mixed", {"good": 3})
    (folder / "good" / "001.png").write_bytes(b"no picture at all")
    assert_said(peft("predict", finished, "--input", folder), 2, "good/001.png", "not-an-image", "data.bad_rows=skip")
    result = peft("predict", finished, "data.bad_rows=skip", "--input", folder)
    assert_said(result, 0, "left out 1 of 3 rows")
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == ["good/000.png", "good/002.png"]


@pytest.mark.parametrize(
    ("what", "words"), [(["--text", "hello"], "this run reads pictures"), (["--input", "."], "no pictures below")]
)
def test_what_has_no_pictures(peft, finished, tmp_path, monkeypatch, what, words) -> None:
    monkeypatch.chdir(tmp_path)
    assert_said(peft("predict", finished, *what), 2, words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:150]), "truncated"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: Image.fromarray(np.zeros((9000, 9000), np.uint8)).save(path), "too-large"),
        (lambda path: _animate(path), "animated"),
    ],
    ids=["truncated", "empty", "huge", "animated"],
)
def test_training_stops_at_a_picture_it_cannot_use(peft, place, tmp_path, spoil, words) -> None:
    folder = pictures.make_folder(tmp_path / "pictures", {"good": 6, "bad": 6})
    spoil(folder / "bad" / "002.png")
    result = peft("train", place / "recipe.yaml", f"data.files.train={folder}", f"output={tmp_path}/runs")
    assert_said(result, 2, "bad/002.png", f"picture is {words}", "data.bad_rows=skip")


def test_training_stops_at_one_class(peft, place, tmp_path) -> None:
    folder = pictures.make_folder(tmp_path / "pictures", {"good": 6})
    result = peft("train", place / "recipe.yaml", f"data.files.train={folder}", f"output={tmp_path}/runs")
    assert_said(result, 1, "label-mismatch", "all training rows have one label: good")


def test_odd_pictures_are_read_and_counted(peft, place, tmp_path) -> None:
    folder = pictures.make_folder(tmp_path / "pictures", {"good": 6, "bad": 6})
    for number, mode in enumerate(("L", "RGBA", "P", "I;16")):
        path = folder / "good" / f"00{number}.png"
        image = Image.open(path).convert("L" if mode == "I;16" else mode)
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image
        image.save(path)
    Image.open(folder / "bad/000.png").convert("CMYK").save(folder / "bad/000.jpg")
    (folder / "bad/000.png").unlink()
    more = ["training.max_steps=1", "data.validation_share=0", "data.test_share=0"]
    result = peft("train", place / "recipe.yaml", f"data.files.train={folder}", f"output={tmp_path}/runs", *more)
    assert_said(result, 0, "12 pictures", "2 grey", "1 CMYK", "1 16-bit")


def _animate(path: Path) -> None:
    frames = [Image.fromarray(pictures.draw("bad", number)) for number in range(3)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def test_what_was_trained_on_first_frames_is_asked_about_first_frames(peft, place, finished, tmp_path) -> None:
    folder = pictures.make_folder(tmp_path / "moving", {"good": 2})
    _animate(folder / "good" / "000.png")
    (folder / "notes.txt").write_text("no picture")
    result = peft("predict", finished, "--input", folder)
    assert_said(result, 2, "picture is animated")
    text = (finished / "config.yaml").read_text()
    (tmp_path / "run").mkdir()
    shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter")
    assert text.count("animated: error") == 1
    (tmp_path / "run" / "config.yaml").write_text(text.replace("animated: error", "animated: first"))
    for name in ("report.json", "environment.json"):
        shutil.copy(finished / name, tmp_path / "run")
    result = peft("predict", tmp_path / "run", "--input", folder)
    assert_said(result, 0, "1 files are no pictures: notes.txt")
    assert len(result.stdout.splitlines()) == 2


def test_columns_that_answers_cover_are_named_and_names_of_any_bytes_are(peft, place, finished, tmp_path) -> None:
    folder = pictures.make_folder(tmp_path / "odd", {"good": 1})
    rows = "file,image,predicted\ngood/000.png,other,me\n"
    (folder / "rows.csv").write_text(rows)
    result = peft("predict", finished, "data.columns.image=file", "--input", folder / "rows.csv")
    assert_said(result, 0, "the predictions take the place of: image, predicted")
    assert json.loads(result.stdout.splitlines()[-1])["image"] == "good/000.png"
    (folder / "good" / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "good" / "000.png").read_bytes())
    result = peft("predict", finished, "data.bad_rows=skip", "--input", folder, "--output", tmp_path / "out.csv")
    assert_said(result, 0, "left out 1 of 2 rows", r"caf\xe9.png: picture has a name that is no UTF-8")
