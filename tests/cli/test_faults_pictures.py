"""What a user may get wrong about pictures, their classes and what is pruned: one plain message each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests import pictures
from tests.commands import assert_said

RECIPE = """\
defaults:
  - method: sparse_adapter
  - task: images
  - data: imagefolder
model: {{name: {model}, source: folder}}
method: {{r: 4, guard: null}}
optim: {{lr: 0.02}}
training: {{max_steps: 12, batch_size: 6, eval_every: end, precision: fp32}}
launch: {{device: cpu, threads: 1}}
output: {output}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    pictures.make_folder(folder / "pictures", {"good": 12, "bad": 12})
    pictures.make_checkpoint(folder / "vit")
    return folder


@pytest.fixture
def recipe(place, tmp_path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(model=place / "vit", output=tmp_path / "runs"))
    return path


@pytest.mark.parametrize("share", [1, 1.5, -0.1, "nan"])
def test_a_sparsity_that_is_no_share(peft, recipe, share) -> None:
    assert_said(peft("train", recipe, f"method.sparsity={share}"), 2, "method.sparsity is", "0 or more and below 1")


def test_a_sparsity_that_leaves_no_unit(peft, place, recipe) -> None:
    result = peft("train", recipe, f"data.files.train={place}/pictures", "method.sparsity=0.99")
    assert_said(result, 2, "method.sparsity=0.99 leaves 0 of 16 units", "a larger method.r")


def test_every_module_pruned_away(peft, place, recipe) -> None:
    result = peft("train", recipe, f"data.files.train={place}/pictures", "method.group=500", "data.validation_share=0")
    assert_said(result, 2, "every module has been pruned away", "method.group", "linear_probe")


def test_a_class_that_training_lacks(peft, place, recipe, tmp_path) -> None:
    held_out = pictures.make_folder(tmp_path / "held out", {"good": 3, "bad": 2}, first=900)
    (held_out / "bad").rename(held_out / "scratched")
    for split in ("validation", "test"):
        files = f"data.files={{train: {place}/pictures, {split}: {held_out}}}"
        words = f"labels of the {split} split that no training row has: 'scratched' (2 rows)"
        assert_said(peft("train", recipe, files, "data.test_share=0"), 1, "label-mismatch", words, "bad, good")


def test_one_class(peft, recipe, tmp_path) -> None:
    pictures.make_folder(tmp_path / "pictures", {"good": 6})
    result = peft("train", recipe, f"data.files.train={tmp_path}/pictures")
    assert_said(result, 1, "label-mismatch", "all training rows have one label: good", "two labels or more")


def test_a_base_whose_head_has_other_labels(peft, place, recipe, tmp_path) -> None:
    base = pictures.make_checkpoint(tmp_path / "base")
    about = json.loads((base / "config.json").read_text())
    about["id2label"] = {str(i): name for i, name in enumerate(("cat", "dog", "owl"))}
    about["label2id"] = {name: i for i, name in enumerate(("cat", "dog", "owl"))}
    (base / "config.json").write_text(json.dumps(about))
    tensors = load_file(base / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][[0, 1, 0]].contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    more = [f"model.name={base}", "training.max_steps=1", "method=linear_probe"]
    recipe.write_text(recipe.read_text().replace("method: {r: 4, guard: null}\n", ""))
    result = peft("train", recipe, f"data.files.train={place}/pictures", *more)
    assert_said(result, 0, "head answers with 3 other labels (cat, dog, owl): a new one is drawn for these rows")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("picturse", ["no folder or file", "did you mean:", "/pictures", "a sub-folder for each class"]),
        ("pictures/good", ["has no sub-folder with pictures in it", "the folder above"]),
        (".", ["needs two labels, and there are 3", "bad/scratch"]),
    ],
    ids=["misspelt", "one class's own folder", "a folder too high"],
)
def test_another_folder_than_the_one_that_is_meant(peft, place, monkeypatch, tmp_path, train, words) -> None:
    (tmp_path / "pictures").symlink_to(place / "pictures")
    for name in ("others", "more"):
        (tmp_path / name).symlink_to(place / "pictures" / "good")
    monkeypatch.chdir(tmp_path)
    assert_said(peft("train", "defects", f"data.files.train={train}", "data.test_share=0.5"), 2, *words)
