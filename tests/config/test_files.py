"""Saved runs, the JSON schema, help from docstrings, and the upgrade of older recipes."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass

import jsonschema
import pytest
import yaml
from omegaconf import OmegaConf

from peftcli.config import catalog, frozen
from peftcli.config.checks import CHECKS
from peftcli.config.compose import compose
from peftcli.config.documents import describe
from peftcli.config.errors import UserError
from peftcli.config.renames import RENAMED
from peftcli.config.schema import TASKS, RunConfig
from peftcli.config.schema_json import schema
from peftcli.config.upgrade import upgraded
from peftcli.config.validate import schema_keys


@pytest.mark.parametrize("recipe", sorted(catalog.recipes()))
def test_a_saved_run_loads_as_the_same_run(recipe, tmp_path):
    config = compose(recipe, ["training.micro_batch_size=2", "optim.eps=1e-12"]).config
    frozen.save(config, tmp_path / "config.yaml")
    assert frozen.load(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").read_text().startswith("schema_version: 1\n")


def test_awkward_texts_survive_saving(tmp_path):
    awkward = [
        "yes",
        "1e3",
        "${",
        "1_000",
        "2020-01-01",
        "null",
        "a: b",
        "${x}",
        "ünï\n\ttab {text}",
        "#",
        "'",
        " x ",
    ]
    for text in awkward:
        config = compose("quickstart").config
        config.name = text
        frozen.save(config, tmp_path / "config.yaml")
        # A reference is resolved once, when the run is composed; in a saved run it is plain text.
        assert frozen.load(tmp_path / "config.yaml").name == text


def test_an_edited_saved_run_is_checked(tmp_path):
    frozen.save(compose("quickstart").config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  lr: ", "  lrr: ").replace("rank", "r"))
    with pytest.raises(UserError) as caught:
        frozen.load(tmp_path / "config.yaml")
    (mistake,) = caught.value.mistakes
    assert mistake.nearest == "optim.lr"
    assert mistake.where.split(":")[1].isdigit()


def test_a_missing_saved_run_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        frozen.load(tmp_path / "config.yaml")


def test_every_field_of_every_settings_class_has_a_line_of_help():
    hints = RunConfig.__annotations__
    groups = [*TASKS.values(), *(catalog.settings_class(name) for name in catalog.methods())]
    from peftcli.config import schema as module

    groups += [getattr(module, name) for name in hints.values() if is_dataclass(getattr(module, name, None))]
    assert len(groups) >= 12
    for cls in groups:
        missing = {item.name for item in fields(cls)} - set(describe(cls))
        assert missing == set(), cls


def test_the_json_schema_describes_what_the_validator_accepts():
    found = json.loads(json.dumps(schema()))
    properties = found["properties"]
    assert properties["optim"]["properties"]["schedule"]["enum"] == ["cosine", "linear", "constant"]
    assert properties["optim"]["properties"]["lr"]["description"] == "Highest learning rate."
    assert properties["training"]["additionalProperties"] is False
    assert {one["properties"]["name"]["enum"][0] for one in properties["method"]["anyOf"]} == set(catalog.methods())
    assert {one["properties"]["type"]["enum"][0] for one in properties["task"]["anyOf"]} == set(TASKS)
    eval_every = properties["training"]["properties"]["eval_every"]
    assert eval_every["anyOf"] == [{"type": "integer"}, {"enum": ["epoch", "end"]}]


def test_every_recipe_agrees_with_the_json_schema():
    validator = jsonschema.Draft202012Validator(schema())
    for recipe, path in catalog.recipes().items():
        assert not list(validator.iter_errors(OmegaConf.to_container(OmegaConf.load(path)))), recipe
        assert not list(validator.iter_errors(compose(recipe).tree)), recipe


def test_checks_are_named_like_files_and_explained():
    for name, about in CHECKS.items():
        assert name == name.lower()
        assert " " not in name
        assert about.endswith(".")


def test_old_names_are_gone_and_new_names_exist():
    keys = {key for task in TASKS.values() for key in schema_keys({"task": task})}
    for name in catalog.methods():
        keys |= set(schema_keys({"method": catalog.settings_class(name)}))
    for old, (_, new) in RENAMED.items():
        assert old not in keys - {"weight_decay", "method.rank"}, old
        assert new in keys, new


class TestUpgrade:
    def test_keys_are_renamed_and_comments_stay(self):
        before = "# mine\noptim:\n  learning_rate: 1e-3  # high\n  eps: 1e-8\nseed: 3  # lucky\n"
        after = "# mine\nschema_version: 1\noptim:\n  lr: 1e-3  # high\n  eps: 1e-8\nseed: 3  # lucky\n"
        assert upgraded(before) == after

    def test_a_key_moves_into_its_group_with_its_comment(self):
        before = (
            "# about\nschema_version: 0\n# found by trying\nlearning_rate: 2e-4  # high\nseed: 1\n\n"
            "optim:\n    eps: 1e-8  # small\n\ntask:\n    head: linear\n"
        )
        assert upgraded(before) == (
            "# about\nschema_version: 1\nseed: 1\n\n"
            "optim:\n    eps: 1e-8  # small\n    # found by trying\n    lr: 2e-4  # high\n\ntask:\n    head: linear\n"
        )

    def test_a_group_is_made_where_there_is_none_and_removed_where_it_is_empty(self):
        after = upgraded("training:\n  learning_rate: 1e-3\n  warmup_ratio: 0.1\nseed: 3\n")
        assert yaml.safe_load(after) == {"schema_version": 1, "seed": 3, "optim": {"lr": "1e-3", "warmup_share": 0.1}}

    def test_values_of_several_lines_move_whole(self):
        after = upgraded("lora_target:\n  - attention.q\n  - mlp\nlora_r: 4\nseed: 0\n")
        assert yaml.safe_load(after)["method"] == {"targets": ["attention.q", "mlp"], "r": 4}

    def test_an_upgraded_recipe_composes(self, tmp_path):
        old = (
            "defaults:\n  - model: smollm2-135m\n  - method: lora\n  - data: reuters-r8\n  - task: classification\n"
            "  - _self_\nlearning_rate: 2e-4\nnum_train_epochs: 3\nlora_r: 4\noutput_dir: elsewhere\n"
        )
        file = tmp_path / "old.yaml"
        file.write_text(old)
        with pytest.raises(UserError) as caught:
            compose(str(file))
        assert [m.nearest for m in caught.value.mistakes] == ["optim.lr", "training.epochs", "method.r", "output"]
        file.write_text(upgraded(old))
        config = compose(str(file)).config
        assert (config.optim.lr, config.training.epochs, config.method.r, config.output) == (2e-4, 3.0, 4, "elsewhere")

    @pytest.mark.parametrize("old", sorted(RENAMED))
    def test_every_old_key_arrives(self, old):
        """Whatever group an old key stood in, its value is found under the new name and nothing else changes."""
        group, _, name = old.rpartition(".")
        before = f"{group}:\n  {name}: 5\n" if group else f"{name}: 5\n"
        tree = yaml.safe_load(upgraded(f"seed: 1\n{before}fetch: true\n"))
        for part in RENAMED[old][1].split("."):
            tree = tree[part]
        assert tree == 5

    def test_a_second_upgrade_changes_nothing(self):
        once = upgraded("learning_rate: 1\nseed: 2\n")
        assert upgraded(once) == once

    @pytest.mark.parametrize("recipe", sorted(catalog.recipes()))
    def test_shipped_recipes_need_none(self, recipe):
        text = catalog.recipes()[recipe].read_text()
        assert upgraded(text) == text

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("learning_rate: 1\noptim:\n  lr: 2\n", "the file has both"),
            ("learning_rate: 1\noptim: {eps: 2}\n", "cannot be moved"),
            ("training: {learning_rate: 1}\n", "cannot be moved"),
            ("schema_version: 9\n", "newer than this program"),
            ("a: [\n", "not valid YAML"),
            ("- a\n", "no `key: value` lines"),
        ],
    )
    def test_what_cannot_be_upgraded_is_said(self, text, what):
        with pytest.raises(UserError, match=what):
            upgraded(text)
