"""`peft data` on folders of pictures: counts, broken files, copies and the contact sheets it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from peftcli.cli.main import app
from peftcli.data.sampler import generator

RECIPE = """
defaults: [{method: lora}, {task: images}, {optim: adamw}, {training: default}, _self_]
schema_version: 1
name: mine
model: {source: folder, name: nowhere}
method: {targets: [attention.q]}
data: {source: files, files: {train: train, test: test}, validation_share: 0}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    for split, count in (("train", 8), ("test", 3)):
        for label, low in (("good", 0), ("bad", 128)):
            folder = Path(split, label)
            folder.mkdir(parents=True)
            for i in range(count):
                draw = generator(split, label, i)
                coarse = draw.integers(low, low + 128, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((30, 40), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    Path("test/good/copy.png").write_bytes(Path("train/good/3.png").read_bytes())
    Path("train/bad/cut.png").write_bytes(Path("train/bad/1.png").read_bytes()[:60])
    Path("mine.yaml").write_text(RECIPE)


def run(*args: str):
    return CliRunner().invoke(app, ["data", "mine.yaml", *args])


def test_json_has_counts_problems_copies_and_sheets():
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["splits"]["train"]["labels"] == {"bad": 9, "good": 8}
    assert found["splits"]["test"]["height"]["max"] == 40
    (problem,) = found["problems"]["train"]
    assert problem["name"] == "bad/cut.png"
    assert found["skipped"] == {"train": {f"picture is {problem['kind']}": 1}}
    assert found["leakage"] == ["1 of 7 test pictures are equal to a training picture, 0 more nearly so"]
    assert {"classes", "copies across splits"} <= set(found["sheets"])
    for path in found["sheets"].values():
        assert Image.open(path).width > 100


def test_the_terminal_says_the_same_in_words():
    result = run()
    assert result.exit_code == 0, result.output
    for words in (
        "30 x 40", "bad/cut.png", "peft train stops at the rows left out here",
        " = train row 12: good/copy.png and good/3.png",
        "leak: 1 of 7 test pictures", "contact sheet of classes:", "fingerprint:",
    ):  # fmt: skip
        assert words in result.output, words
    assert "stops at" not in run("data.bad_rows=skip").output
