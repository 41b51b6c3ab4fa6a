"""Ranges of the augmentations are checked under the task they belong to."""

from __future__ import annotations

import pytest

from peftcli.config.compose import compose
from peftcli.config.errors import UserError

BAD = {
    "crop=0": "more than 0", "crop=1.2": "at most 1", "colour=1.5": "0 to 1", "rotation=200": "0 to 180",
    "randaugment=-1": "0 or more", "randaugment_strength=31": "0 to 30", "mixup=-0.1": "0 or more",
    "cutmix=-1": "0 or more", "flipp=true": "flip",
}  # fmt: skip
RECIPE = """
defaults: [{model: smollm2-135m}, {method: lora}, {task: images}, {optim: adamw}, {training: default}, _self_]
schema_version: 1
name: mine
data: {source: files, files: {train: pictures}}
method: {targets: [attention.q]}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize("setting", BAD)
def test_values_out_of_range_are_named(recipe, setting):
    with pytest.raises(UserError) as caught:
        compose(recipe, [f"task.augment.{setting}"])
    (mistake,) = caught.value.mistakes
    assert f"task.augment.{setting.partition('=')[0]}" in mistake.what
    assert BAD[setting] in str(mistake)


def test_good_values_arrive(recipe):
    chosen = compose(recipe, ["task.augment.flip=true", "task.augment.crop=0.5", "task.augment.mixup=0.2"]).config
    assert (chosen.task.augment.flip, chosen.task.augment.crop, chosen.task.augment.mixup) == (True, 0.5, 0.2)
    assert chosen.task.augment.rotation == 0.0


def test_features_can_be_kept_where_pictures_stay_the_same(recipe):
    asked = "training.cache_features=true"
    assert compose(recipe, [asked, "task.augment.randaugment_strength=5"]).config.training.cache_features is True
    assert compose(recipe, ["task.augment.flip=true"]).config.training.cache_features == "auto"
    for change in ("cutmix=1", "crop=0.5", "rotation=3"):
        with pytest.raises(UserError, match=r"task\.augment changes them each time"):
            compose(recipe, [asked, f"task.augment.{change}"])
