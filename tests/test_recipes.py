"""Every shipped recipe composes and validates; those with a stand-in on this machine train two steps."""

from __future__ import annotations

import pytest

from peftcli.config import catalog
from peftcli.config.compose import compose
from tests.pictures import make_folder

RECIPES = sorted(catalog.recipes())
AT_THE_HUB = ("llama2-7b/", "mamba/", "vit/cifar10", "vit/imagenet", "resnet/cifar10", "resnet/imagenet")
OFFLINE = [name for name in RECIPES if not name.startswith(AT_THE_HUB)]
SHORT = [
    "training.max_steps=2", "data.rows={train: 12, validation: 4, test: 6}", "training.batch_size=4",
    "training.eval_every=end", "fetch=false",
]  # fmt: skip


FEW_SHOT = [
    "training.max_steps=2", "training.batch_size=1", "training.eval_every=end", "fetch=false",
    "task.episodes=4", "task.validation_episodes=2", "task.test_episodes=2",
]  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes(name):
    composed = compose(name, [])
    assert composed.config.name == name.replace("/", "_")
    assert composed.notes == []


def test_there_are_recipes_of_each_kind():
    assert {"quickstart", "smollm2/reuters-r8_lora", "smollm2/wordnet-gloss_lora", "llama2-7b/gsm8k_lora"} <= set(
        RECIPES
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "quickstart" else pytest.param(name, marks=pytest.mark.samples) for name in OFFLINE]
)
def test_a_recipe_trains_two_steps(name, tmp_path):
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.training.run import run

    more = ["task.generated_rows=2", "task.max_new_tokens=4"] if "gloss" in name or "gsm8k" in name else []
    if name == "quickstart":  # which names 45 labels, and a dozen rows do not have them all
        more = ["data.rows.train=6000"]
    few_shot = compose(name, []).config.task.type == "episodes"
    if "emoji" in name and not few_shot:  # nine classes
        more = ["data.rows.train=120"]
    if name == "defects" or "imagefolder" in name:
        more = [f"data.files.train={make_folder(tmp_path / 'pictures', {'good': 20, 'bad': 20})}"]
    composed = compose(name, [*(FEW_SHOT if few_shot else SHORT), *more, f"output={tmp_path}"])
    folder = RunFolder.create(composed.config, composed.overrides)
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    names = [row["name"] for row in report["quality"]["rows"]]
    assert names[0] == ("majority class" if composed.config.task.type == "images" else "untouched base")
    assert names[-1] == "tuned"
    assert folder.page.is_file()
