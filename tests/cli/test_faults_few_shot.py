"""`peft train` on domains that are too small, with one expert, with a sparsity that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import few_shot, pictures
from tests.commands import assert_said

RECIPE = """\
defaults:
  - method: smat
  - task: episodes
model: {{name: {model}, source: folder}}
data:
  source: domains
  validation_share: 0
  test_share: 0.4
  domains: {{mine: {{source: files, files: {{train: {rows}}}}}}}
method: {{experts: 2, sparsity: 0.5}}
task: {{image_size: 16, ways: [3, 5], support: 12, class_support: 3, queries: 2, episodes: 4, test_episodes: 3}}
optim: {{lr: 0.001}}
training: {{max_steps: 2, batch_size: 2, micro_batch_size: 1, eval_every: end, precision: fp32}}
launch: {{device: cpu, threads: 1}}
output: {output}
name: few
"""


@pytest.fixture
def recipe(tmp_path):
    """`recipe(classes, rows)` is a recipe over so many classes of so many pictures."""

    def make(classes: int, rows: int) -> Path:
        place = few_shot.make_domain(tmp_path / "mine", classes, rows, 0)
        file = tmp_path / "few.yaml"
        model = pictures.make_checkpoint(tmp_path / "vit")
        file.write_text(RECIPE.format(model=model, rows=place, output=tmp_path / "runs"))
        return file

    return make


def test_fewer_classes_than_ways_and_pictures_than_shots_are_said_and_used(peft, recipe) -> None:
    result = peft("train", recipe(5, 3))
    assert_said(result, 0, "mine has 2 classes in test: its tasks have all of them, fewer than task.ways asks for",
                "9 pictures of 3 classes in 1 domains", "test split, 3 tasks",
                "of what the 3 held-out tasks ask")  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "rows", "words"),
    [
        (1, 5, ("data.domains.mine: 1 of 1 classes have 2 rows or more, and a task needs two",)),
        (4, 1, ("data.domains.mine: 0 of 4 classes have 2 rows or more", "give it more rows")),
        (3, 4, ("data.domains.mine: 3 classes leave 1 for train, and a task needs two", "held_out: true")),
    ],
)
def test_domains_that_give_no_task_are_named(peft, recipe, classes, rows, words) -> None:
    assert_said(peft("train", recipe(classes, rows)), 2, *words)


def spoil(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"no picture")


def test_classes_without_readable_pictures_are_counted_or_end_it(peft, recipe, tmp_path) -> None:
    asked = ("train", recipe(8, 4), "--dry-run", "data.test_share=0", "data.bad_rows=skip")
    spoil(tmp_path / "mine" / "class0")
    result = peft(*asked)
    assert_said(result, 0)
    printed = " ".join(result.output.split())
    for words in ("7 classes in 1 domains", "1 classes left out for want of rows", "left out 4 of 32 rows"):
        assert words in printed
    for number in range(1, 7):
        spoil(tmp_path / "mine" / f"class{number}")
    assert_said(peft(*asked), 2, "data.domains: no domain has two classes of two rows in train")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.sparsity=1", "method.sparsity"),
        ("method.sparsity=-0.1", "method.sparsity"),
        ("method.experts=0", "method.experts"),
        ("task.ways=[5,3]", "task.ways"),
    ],
)
def test_numbers_that_cannot_be(peft, recipe, override, words) -> None:
    assert_said(peft("train", recipe(5, 3), override), 2, words)


def test_one_expert_is_said_and_explained(peft, recipe, made, tmp_path) -> None:
    result = peft("train", recipe(6, 4), "method.experts=1")
    assert_said(result, 0, "one expert: its weight is 1 for every task, and the router is not trained")
    rows = tmp_path / "mine"
    result = peft("predict", made().path, "--support", rows, "--input", rows, "--explain")
    assert_said(result, 0, "there is one expert, and its weight is 1; it changes")
