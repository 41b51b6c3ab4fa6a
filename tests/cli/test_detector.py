"""A detector of defects from a folder of pictures to verdicts: which label is the defect, what is said of it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from tests import pictures
from tests.commands import assert_said

TINY = [
    "model.name={model}", "model.source=folder", "~model.shape", "task.image_size=16", "method.r=4", "optim.lr=0.02",
    "training.epochs=3", "training.batch_size=8", "training.precision=fp32", "launch={{device: cpu, threads: 1}}",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("detector")
    pictures.make_folder(folder / "pictures", {"good": 60, "bad": 20})
    pictures.make_folder(folder / "new", {"good": 20, "bad": 5}, first=700)
    pictures.make_checkpoint(folder / "resnet", "resnet")
    return folder


@pytest.fixture(scope="module")
def overrides(place) -> list[str]:
    return [*(one.format(model=place / "resnet") for one in TINY), f"data.files.train={place}/pictures"]


@pytest.fixture(scope="module")
def finished(place, overrides) -> tuple[Path, str]:
    """The run of the shipped recipe over a tiny model, and what it said."""
    from typer.testing import CliRunner

    from peftcli.cli.main import app

    arguments = ["train", "defects", *overrides, f"output={place}/runs"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [run] = (place / "runs").glob("*_defects")
    return run, result.output


def test_training_says_what_it_looks_for_and_what_came(finished) -> None:
    run, output = finished
    assert "'bad' is taken for the defect, 'good' not (task.positive=good if wrong)" in output
    assert "12 other validation pictures set it so that at most 5.0 % of them are false alarms" in output
    assert "they are too few for that: 7.7 % are to be expected" in output
    found = re.search(r"On the test split (\d) of 4 bad pictures are found .*, (\d+) of 12 others are false", output)
    told = json.loads((run / "report.json").read_text())["quality"]["answers"]
    assert found is not None
    assert [int(count) for count in found.groups()] == [told["alarms"]["found"][0], told["alarms"]["false"][0]]
    assert told["confusion"]["counts"][0][0] == told["alarms"]["found"][0]
    page = (run / "report.html").read_text()
    assert "A picture is called bad above a score of" in page
    assert "while 5.0 % of the other rows are taken for it" in page


def test_a_verdict_goes_by_the_score_that_the_validation_pictures_set(peft, place, finished, tmp_path) -> None:
    run, _ = finished
    least = json.loads((run / "report.json").read_text())["quality"]["answers"]["alarms"]["score"]
    result = peft("predict", run, "--input", place / "new", "--output", tmp_path / "new.csv")
    rows = list(csv.DictReader((tmp_path / "new.csv").open()))
    flagged = sum(row["predicted"] == "bad" for row in rows)
    assert_said(result, 0, f"25 rows answered ({flagged} bad, {25 - flagged} good)")
    assert [row["predicted"] for row in rows] == ["bad" if float(row["score"]) > least else "good" for row in rows]
    assert list(rows[0])[:3] == ["image", "predicted", "score"]


def test_another_rate_of_false_alarms_needs_no_training(peft, place, finished, tmp_path) -> None:
    run, _ = finished

    def flagged(*overrides: str) -> set[str]:
        rows = json.loads(peft("predict", run, *overrides, "--input", place / "new", "--json").stdout)["predictions"]
        return {row["image"] for row in rows if row["predicted"] == "bad"}

    few, many = flagged(), flagged("task.false_alarms=0.7")
    assert few < many
    found = json.loads(peft("eval", run, "task.false_alarms=0.7", "--json").stdout)["quality"]
    assert found["answers"]["alarms"]["asked"] == 0.7
    assert_said(
        peft("eval", run, "task.false_alarms=1.2"), 2, "task.false_alarms is 1.2, expected 0 or more and below 1"
    )


def test_the_card_has_the_score(finished) -> None:
    run, _ = finished
    card = (run / "adapter" / "README.md").read_text()
    [line] = [line for line in card.splitlines() if line.startswith("print('bad' if chances[0] > ")]
    least = json.loads((run / "report.json").read_text())["quality"]["answers"]["alarms"]["score"]
    assert float(line.split()[4]) == pytest.approx(least, rel=1e-5)


def test_folders_whose_names_do_not_tell(peft, overrides, place, tmp_path) -> None:
    for label, name in (("good", "left"), ("bad", "right")):
        folder = tmp_path / "pictures" / name
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(place / "pictures" / label)
    given = [*overrides[:-1], f"data.files.train={tmp_path}/pictures", f"output={tmp_path}/runs"]
    words = ("which of the labels 'left' and 'right' is the defect?", "task.positive=left, task.positive=right")
    for command in ("train", "data"):
        assert_said(peft(command, "defects", *given), 2, *words)
    assert "'right' is taken for the defect" not in peft("data", "defects", *given, "task.positive=right").output


def test_without_validation_pictures_the_likelier_label_is_the_verdict(peft, overrides, tmp_path) -> None:
    more = ["data.validation_share=0", "training.max_steps=1", f"output={tmp_path}/runs"]
    result = peft("train", "defects", *overrides, *more)
    assert_said(result, 0, "above a score of 50.0 %; no validation pictures could set it")
