"""Copies stay on one side of a cut, are told where they cross a given one, and look-alikes do not glue all together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from peftcli.config.errors import UserError
from peftcli.config.schema import DataConfig
from peftcli.data import sources
from peftcli.data.images import copies
from peftcli.data.sampler import generator

NEEDED = ["image", "label"]


def drawing(*key: object) -> Image.Image:
    """Coarse random patches, unlike those of any other key."""
    coarse = generator("copies", *key).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty pictures of each class; every fourth one comes three times, each time encoded otherwise."""
    for label in ("good", "bad"):
        (tmp_path / "all" / label).mkdir(parents=True)
        for number in range(20):
            picture, place = drawing(label, number), tmp_path / "all" / label
            picture.save(place / f"{number:02}.png")
            if number % 4 == 0:
                picture.save(place / f"{number:02}_again.jpg", quality=70)
                picture.resize((60, 60)).save(place / f"{number:02}_small.png")
    return tmp_path / "all"


def load(**data) -> sources.Splits:
    return sources.load(DataConfig(source="files", **data), NEEDED)


def things(rows) -> set[str]:
    """Class and number of each picture: those of a thing share them."""
    return {row["image"]["path"].split(".")[0].split("_")[0] for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_on_one_side_of_every_cut(folder, seed) -> None:
    found = load(files={"train": str(folder)}, validation_share=0.2, test_share=0.2, seed=seed)
    parts = [things(part) for part in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == 40
    assert set.union(*parts) == {f"{label}/{n:02}" for label in ("good", "bad") for n in range(20)}
    assert all(10 <= found.counts[split] <= 12 for split in ("validation", "test"))
    assert {row["label"] for row in found.test} == {"good", "bad"}
    assert "30 nearly equal pictures in 10 groups stay together when rows are set aside" in found.notes


def test_what_pictures_are_compared_by_is_kept(folder, monkeypatch) -> None:
    before = load(files={"train": str(folder)})
    monkeypatch.setattr(copies, "_print", lambda picture: pytest.fail("decoded again"))
    assert load(files={"train": str(folder)}).fingerprint == before.fingerprint
    for file in (Path(copies.paths.cache()) / "prints").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    monkeypatch.undo()
    assert load(files={"train": str(folder)}).fingerprint == before.fingerprint


def test_a_given_split_that_has_seen_training_pictures_is_told(folder, tmp_path) -> None:
    (tmp_path / "test" / "good").mkdir(parents=True)
    for number in range(6):
        drawing("good", number if number < 2 else 100 + number).save(tmp_path / "test" / "good" / f"{number}.png")
    notes = load(files={"train": str(folder), "test": str(tmp_path / "test")}).notes
    [leak] = [note for note in notes if note.startswith("leak")]
    assert leak.startswith("leak: 2 of 6 test pictures are copies of training pictures")
    assert "good/0.png = good/00.png, good/1.png = good/01.png" in leak


def test_parts_of_one_kind_are_not_taken_for_one_part(tmp_path) -> None:
    """A camera above a belt: every picture is nearly every other one."""
    scene = np.array(drawing("belt")).astype(np.int16)
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        for number in range(15):
            noise = generator("belt", label, number).normal(0, 6, scene.shape)
            image = Image.fromarray(np.clip(scene + noise, 0, 255).astype(np.uint8))
            image.save(tmp_path / label / f"{number:02}.png")
    image.save(tmp_path / "bad" / "14_twice.png")
    found = load(files={"train": str(tmp_path)}, test_share=0.2)
    assert found.counts["test"] == 6
    [told] = [note for note in found.notes if "stay together" in note]
    assert told.startswith("2 equal pictures in one group stay together")


def test_a_class_of_copies_alone_cannot_be_cut(tmp_path) -> None:
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        for number in range(8):
            drawing(label).save(tmp_path / label / f"{number}.png")
    with pytest.raises(UserError, match="are copies of each other"):
        load(files={"train": str(tmp_path)})
