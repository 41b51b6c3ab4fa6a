"""Recipes and overrides composed: precedence, origins, the user's own groups, Hydra's grammar."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftcli.config import catalog
from peftcli.config.compose import compose
from peftcli.config.errors import UserError
from tests.minimal import RECIPE as MINIMAL

RECIPES = sorted(catalog.recipes())


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below a scratch folder, which is also the working folder."""
    monkeypatch.chdir(tmp_path)

    def _write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return _write


def test_shipped_recipes_are_found_recursively():
    assert {"quickstart", "smollm2/reuters-r8_lora", "smollm2/wordnet-gloss_lora", "llama2-7b/gsm8k_lora"} <= set(
        RECIPES
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_is_valid_and_says_what_it_is(recipe):
    composed = compose(recipe)
    assert composed.config.schema_version == 1
    text = composed.recipe_path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first comment is what `peft ls` prints"
    assert "defaults:\n" in text
    method = composed.config.method
    named = "pissa" if getattr(method, "init", "").startswith("pissa") else method.name
    if method.name == "rowcol" and (method.mode != "adapter" or recipe.endswith("-adapter")):
        named = f"rowcol-{method.mode}"
    named = {"vit/emoji_meta": "meta", "vit/emoji_protonet": "protonet"}.get(recipe, named)  # by what they are called
    assert recipe in ("quickstart", "defects") or recipe.endswith(f"_{named}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_lists_every_group(recipe):
    """Nothing of a run comes from a group that the recipe does not show."""
    text = compose(recipe).recipe_path.read_text(encoding="utf-8")
    for group in ("model", "method", "data", "task", "optim", "training", "launch", "tracker"):
        assert f"\n  - {group}: " in text


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group, choices in catalog.groups().items() for choice in choices]
)
def test_every_group_file_composes(group, choice):
    extra = {
        ("method", "peft"): ["method.type=LORA"],
        ("method", "linear_probe"): ["task.head=linear"],
        ("data", "files"): ["data.files.train=rows.jsonl"],
        ("data", "hub"): ["data.name=someone/something"],
        ("data", "few-shot-pictures"): ["task=episodes"],
        ("data", "few-shot-text"): ["task=episodes"],
        ("task", "episodes"): ["data=few-shot-text"],
        ("method", "smat"): ["data=few-shot-text", "task=episodes"],
    }.get((group, choice), [])
    composed = compose("quickstart", [f"{group}={choice}", *extra])
    name = composed.tree[group].get("name") or composed.tree[group].get("type")
    if group in ("method", "tracker"):
        assert name == choice


def test_overrides_beat_the_recipe_and_the_recipe_beats_its_groups(write):
    write("own.yaml", MINIMAL + "method:\n  r: 5\n")
    assert compose("own.yaml").config.method.r == 5
    assert compose("own.yaml", ["method.r=6"]).config.method.r == 6
    composed = compose("own.yaml", ["method.r=6", "method.r=7"])
    assert composed.config.method.r == 7
    assert composed.origins["method.r"] == "override method.r=7"


def test_origins_name_file_and_line_override_or_schema(write):
    write("own.yaml", MINIMAL + "seed: 4\noptim: {lr: 1e-3}\n")
    write("configs/optim/slow.yaml", "lr: 1e-5\neps: 1e-6\n")
    origins = compose("own.yaml", ["optim=slow", "training.epochs=2", "data.rows={train: 5}"]).origins
    assert origins["seed"] == "own.yaml:7"
    assert origins["optim.eps"] == "configs/optim/slow.yaml:2"
    assert origins["training.epochs"] == "override training.epochs=2"
    assert origins["data.rows.train"] == "override data.rows={train: 5}"
    assert origins["training.precision"] == "schema default"
    assert origins["method.r"].endswith("configs/method/lora.yaml:3")


def test_every_value_of_a_composed_recipe_has_an_origin():
    composed = compose("llama2-7b/gsm8k_lora", ["seed=3"])
    for group, value in composed.tree.items():
        for key in [f"{group}.{name}" for name in value] if isinstance(value, dict) else [group]:
            assert composed.origins[key], key


def test_a_group_may_be_chosen_that_the_recipe_does_not_list(write):
    write(
        "own.yaml", "defaults:\n  - model: smollm2-135m\n  - data: reuters-r8\n  - task: classification\n  - _self_\n"
    )
    composed = compose("own.yaml", ["method=lora", "tracker=trackio"])
    assert composed.config.method.name == "lora"
    assert composed.config.tracker.name == "trackio"


def test_the_users_own_groups_are_found_first(write):
    write("own.yaml", MINIMAL)
    write("configs/method/lora.yaml", "name: lora\nr: 77\n")
    write("configs/method/mine.yaml", "defaults: [lora, _self_]\nalpha: 3\n")
    assert compose("own.yaml").config.method.r == 77
    mine = compose("own.yaml", ["method=mine"])
    assert (mine.config.method.r, mine.config.method.alpha) == (77, 3.0)
    assert mine.origins["method.alpha"] == "configs/method/mine.yaml:2"


def test_only_the_recipes_own_folder_is_searched(write):
    write("configs/method/lora.yaml", "name: lora\nr: 77\n")  # in the working folder, not beside the recipe
    write("deep/own.yaml", MINIMAL)
    assert compose("deep/own.yaml").config.method.r == 8


def test_a_group_of_the_users_own_with_a_global_package(write):
    write("own.yaml", MINIMAL)
    write("configs/experiment/big.yaml", "# @package _global_\noptim:\n  lr: 0.5\nseed: 9\n")
    composed = compose("own.yaml", ["experiment=big"])
    assert (composed.config.optim.lr, composed.config.seed) == (0.5, 9)
    assert composed.origins["optim.lr"] == "configs/experiment/big.yaml:3"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("++optim.lr=2", "optim.lr", 2.0),
        ("+optim.weight_decay=0.1", "optim.weight_decay", 0.1),
        ("optim.weight_decay=0.1", "optim.weight_decay", 0.1),
        ("optim.betas=[0.8,0.9]", "optim.betas", [0.8, 0.9]),
        ("~optim.lr", "optim.lr", 1e-3),
        ("training.max_steps=null", "training.max_steps", None),
        ("training.eval_every=5", "training.eval_every", 5),
        ("training.eval_every=end", "training.eval_every", "end"),
        ("seed=${data.seed}", "seed", 0),
        ("data.columns.text=body", "data.columns", {"text": "body", "label": "label"}),
        ("data.columns={label: topic}", "data.columns", {"text": "text", "label": "topic"}),
        ("name='a=b, c'", "name", "a=b, c"),
        ('name="1234"', "name", "1234"),
        ("method.lora_targets=[ssm.in,ssm.x]", "method.lora_targets", ["ssm.in", "ssm.x"]),
        ("seed=int(3.0)", "seed", 3),
        ("~tracker", "tracker.name", "none"),
    ],
)
def test_hydras_grammar(override, key, value):
    tree = compose("quickstart", [override]).tree
    for part in key.split("."):
        tree = tree[part]
    assert tree == value


def test_yaml_numbers_in_scientific_notation_are_numbers(write):
    write("own.yaml", MINIMAL + "optim:\n  lr: 1e-3\n  eps: 1E-7\n")
    config = compose("own.yaml").config
    assert (config.optim.lr, config.optim.eps) == (1e-3, 1e-7)


def test_references_see_values_and_schema_defaults(write):
    write("own.yaml", MINIMAL + "name: run-${seed}-${method.r}-${method.dropout}\n")
    composed = compose("own.yaml", ["method.r=${training.batch_size}"])
    assert composed.config.name == "run-0-8-0.0"
    assert composed.origins["seed"] == "schema default"


def test_another_method_leaves_the_recipes_own_values_out_and_says_so():
    composed = compose("quickstart", ["method=full"])
    assert composed.config.method.name == "full"
    assert len(composed.notes) == 1
    assert "method.channels" in composed.notes[0]
    assert "method.lora_targets" in composed.notes[0]
    assert "quickstart.yaml:" in composed.notes[0]
    kept = compose("quickstart", ["method=sdt"])
    assert kept.notes == []
    assert kept.config.method == compose("quickstart").config.method


def test_other_data_and_another_model_leave_the_recipes_own_out(write):
    own = "data: {source: files, files: {train: a.jsonl}}\nmodel: {source: folder, name: here}\n"
    listed = MINIMAL.replace("  - data: reuters-r8\n", "").replace("  - model: smollm2-135m\n", "")
    write("own.yaml", listed + own)
    assert compose("own.yaml").config.data.files == {"train": "a.jsonl"}
    composed = compose("own.yaml", ["data=wordnet-gloss", "model=smollm2-135m"])
    assert (composed.config.data.source, composed.config.data.files) == ("sample", {})
    assert composed.config.model.name == "smollm2-135m"
    said = "\n".join(composed.notes)
    assert "data=wordnet-gloss: the recipe's own data.source, data.files (own.yaml:" in said
    assert "model=smollm2-135m: the recipe's own model.source, model.name (own.yaml:" in said


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("entry", "rank"), [("", 31), ("  - _self_\n", 31)])
def test_a_recipes_own_values_come_last_unless_it_says_otherwise(write, entry, rank):
    write("own.yaml", MINIMAL.replace("  - _self_\n", entry) + "method:\n  r: 31\n")
    assert compose("own.yaml").config.method.r == rank
    write("first.yaml", MINIMAL.replace("  - _self_\n", "").replace(":\n", ":\n  - _self_\n", 1) + "method:\n  r: 31\n")
    assert compose("first.yaml").config.method.r == 8


def test_a_recipe_needs_no_defaults_list(write):
    write(
        "own.yaml",
        """\
model: {name: m, source: folder}
data: {source: files, files: {train: a.jsonl}}
method: {name: full}
task: {type: generation}
""",
    )
    config = compose("own.yaml").config
    assert config.model.name == "m"
    assert config.name == "own"
    assert config.optim.lr == 1e-3


def test_names_beat_nothing_and_paths_need_no_folder(write):
    write("mine.yaml", MINIMAL)
    assert compose("mine.yaml").recipe_path == Path("mine.yaml").resolve()


@pytest.fixture
def outside_method(tmp_path, monkeypatch):
    """An installed package with a method of its own, found through its entry point."""
    package = tmp_path / "site" / "outside"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "settings.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\n\n"
        "@dataclass\nclass Settings:\n    name: Literal['outside'] = 'outside'\n    strength: float = 1.0\n"
    )
    info = tmp_path / "site" / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peftcli.methods]\noutside = outside\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    catalog.methods.cache_clear()
    yield
    catalog.methods.cache_clear()


def test_a_method_of_an_outside_package_needs_no_group_file(write, outside_method):
    write("own.yaml", MINIMAL.replace("lora", "outside"))
    assert compose("own.yaml", ["method.strength=3"]).config.method.strength == 3.0
    assert compose("quickstart", ["method=outside"]).config.method.name == "outside"
    with pytest.raises(UserError, match=r"did you mean: method\.strength"):
        compose("own.yaml", ["method.strenght=3"])


def test_composing_twice_gives_the_same_and_keeps_no_state():
    first = compose("quickstart", ["method.r=3"]).tree
    assert compose("quickstart").config.method.r == 8
    assert compose("quickstart", ["method.r=3"]).tree == first


REHEARSED = """
defaults:
  - data: gsm8k
  - method: lora
  - task: generation
  - _self_
model: {name: tiny, source: folder, weights: pretrained, shape: {model_type: llama}}
training: {batch_size: 128}
rehearsal:
  overrides:
    - data=wordnet-categories
    - training.batch_size=2
    - training.max_steps=3
"""


def test_random_weights_rehearse_a_recipe_by_its_own_overrides(write):
    recipe = str(write("mine.yaml", REHEARSED))
    assert compose(recipe).config.training.batch_size == 128
    found = compose(recipe, ["model.weights=random", "training.max_steps=5"])
    assert (found.config.data.name, found.config.training.batch_size) == ("wordnet-categories", 2)
    assert found.config.training.max_steps == 5, "the command line has the last word"
    assert found.origins["training.batch_size"] == "rehearsal, mine.yaml:10"
    assert found.origins["training.max_steps"] == "override training.max_steps=5"
    [note] = found.notes
    assert "data=wordnet-categories, training.batch_size=2 (" in note


@pytest.mark.parametrize("mine", [["data=gsm8k"], ["data=reuters-r8", "task=classification", "data.rows.train=9"]])
def test_rows_and_tasks_of_the_user_are_rehearsed_as_they_are(mine):
    found = compose("llama2-7b/gsm8k_kpsvd", ["model.weights=random", *mine]).config
    assert (f"data={found.data.name.partition('/')[2] or found.data.name}", found.training.batch_size) == (mine[0], 1)


def test_a_mistake_in_a_rehearsal_is_found_when_it_is_asked_for(write):
    recipe = str(write("mine.yaml", REHEARSED.replace("batch_size=2", "batch_sise=2")))
    compose(recipe)
    with pytest.raises(UserError, match="batch_sise"):
        compose(recipe, ["model.weights=random"])


@pytest.mark.parametrize("recipe", [name for name in RECIPES if compose(name).config.rehearsal.overrides])
def test_every_rehearsal_composes(recipe):
    assert compose(recipe, ["model.weights=random"]).config.model.weights == "random"
