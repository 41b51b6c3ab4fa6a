"""`peft config`, `peft ls`, `peft cp`: what they print, write and refuse."""

from __future__ import annotations

import json

import pytest
import yaml
from typer.testing import CliRunner

from peftcli.cli.main import app
from peftcli.config import catalog
from peftcli.config.checks import CHECKS
from peftcli.config.compose import compose
from tests.minimal import RECIPE


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_config_prints_yaml_that_is_the_composed_run():
    result = run("config", "quickstart", "seed=5", "name='1e3'")
    assert result.exit_code == 0
    tree = yaml.safe_load(result.stdout)
    assert tree["seed"] == 5
    assert tree["name"] == "1e3"
    assert tree == compose("quickstart", ["seed=5", "name='1e3'"]).tree


def test_config_can_be_run_again_as_a_recipe(tmp_path):
    (tmp_path / "again.yaml").write_text(run("config", "smollm2/wordnet-gloss_lora").stdout)
    assert compose("again.yaml").tree == compose("smollm2/wordnet-gloss_lora").tree


def test_explain_is_the_same_yaml_with_help_above_the_keys():
    plain, explained = run("config", "quickstart").stdout, run("config", "quickstart", "--explain").stdout
    assert yaml.safe_load(plain) == yaml.safe_load(explained)
    assert "  # Highest learning rate.\n  lr: 0.0" in explained
    assert "  # Rank of LoRA.\n  r: 8\n" in explained
    assert [line for line in explained.splitlines() if not line.lstrip().startswith("# ")] == plain.splitlines()


def test_origin_shows_every_leaf_once():
    printed = run("config", "quickstart", "optim.lr=3", "--origin").stdout
    rows = {line.split()[0]: line for line in printed.splitlines()}
    assert "override optim.lr=3" in rows["optim.lr"]
    assert rows["optim.lr"].endswith("3.0")
    assert "schema default" in rows["training.precision"]
    assert " recipes/quickstart.yaml:" in rows["training.batch_size"]
    assert " configs/model/mamba-wordnet.yaml:" in rows["model.name"]
    assert "…" not in printed
    assert len(rows) == len(printed.splitlines())


def test_json_forms():
    assert json.loads(run("config", "quickstart", "--json").stdout) == compose("quickstart").tree
    rows = json.loads(run("config", "quickstart", "--origin", "--json").stdout)
    assert {"key": "seed", "value": 0, "origin": "schema default"} in rows


def test_schema_needs_no_recipe():
    assert json.loads(run("config", "--schema").stdout)["title"] == "peft recipe"


def test_notes_go_to_standard_error():
    result = run("config", "quickstart", "method=full")
    assert "left out" in result.stderr
    assert yaml.safe_load(result.stdout)["method"]["name"] == "full"


@pytest.mark.parametrize(
    "arguments", [["config"], ["config", "nothing"], ["config", "quickstart", "a="], ["config", "quickstart", "a"]]
)
def test_config_mistakes(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "mistake:" in result.stderr


def test_upgrade_rewrites_the_file_and_prints_the_difference(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(RECIPE + "learning_rate: 1e-3  # high\n")
    result = run("config", "old.yaml", "--upgrade")
    assert result.exit_code == 0, result.output
    assert "-learning_rate: 1e-3  # high" in result.stdout
    assert "+  lr: 1e-3  # high" in result.stdout
    assert compose("old.yaml").config.optim.lr == 1e-3
    assert "up to date" in run("config", "old.yaml", "--upgrade").stdout


def test_upgrade_takes_no_overrides_and_leaves_the_file_on_a_mistake(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("learning_rate: 1\noptim: {lr: 2}\n")
    assert run("config", "old.yaml", "seed=3", "--upgrade").exit_code == 2
    result = run("config", "old.yaml", "--upgrade")
    assert result.exit_code == 2
    assert "the file has both" in result.stderr
    assert file.read_text() == "learning_rate: 1\noptim: {lr: 2}\n"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("recipes", set(catalog.recipes())),
        ("models", {"smollm2-135m", "llama2-7b"}),
        ("methods", {"lora", "peft", "linear_probe", "full"}),
        ("data", {"reuters-r8", "wordnet-gloss", "gsm8k", "gsm8k-test"}),
        ("checks", set(CHECKS)),
    ],
)
def test_ls(kind, names):
    listed = json.loads(run("ls", kind, "--json").stdout)
    assert names <= {row["name"] for row in listed}
    assert all(row["about"] for row in listed)
    lines = run("ls", kind).stdout.splitlines()
    assert {line.split()[0] for line in lines} == {row["name"] for row in listed}, "one whole line each, for grep"


def test_ls_of_something_else():
    result = run("ls", "methds")
    assert result.exit_code == 2
    assert result.output.startswith(
        "mistake: unknown kind of thing to list 'methds'\n  did you mean: methods\n  allowed: "
    )
    assert run("ls", "methods", "runs").exit_code == 2


def test_cp_copies_a_recipe_that_composes_and_does_not_overwrite(tmp_path):
    assert run("cp", "quickstart", "mine.yaml").exit_code == 0
    assert compose("mine.yaml").tree == compose("quickstart").tree
    (tmp_path / "mine.yaml").write_text("mine")
    refused = run("cp", "quickstart", "mine.yaml")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "mine.yaml").read_text() == "mine"
    assert run("cp", "quickstart", "mine.yaml", "--force").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() != "mine"


def test_cp_into_a_folder_and_into_nowhere(tmp_path):
    assert run("cp", "smollm2/reuters-r8_lora", ".").exit_code == 0
    assert (tmp_path / "reuters-r8_lora.yaml").is_file()
    assert "cannot write" in run("cp", "quickstart", "no/such/folder.yaml").stderr
    assert "end in .yaml" in run("cp", "quickstart", "mine").stderr
    assert run("cp", "quikstart", "b.yaml").exit_code == 2
