"""What is asked for does not exist, does not fit together or is not safe: named before it costs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from peftcli.artifacts.environment import cores
from peftcli.training import checkpoints
from tests.commands import assert_said

TOO_FAST = ["optim.lr=3e38", "optim.clip_norm=null", "optim.warmup_share=0", "optim.schedule=constant"]
NOWHERE = "http://hub.invalid"


def without(recipe: Path, group: str) -> Path:
    tree = yaml.safe_load(recipe.read_text())
    del tree[group]
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def pickled(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with its weights as a pickle that would leave a file behind if it were read."""
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    body = f"cos\nsystem\n(S'touch {folder / 'was_run'}'\ntR."
    (folder / "pytorch_model.bin").write_text(body)
    return folder


def test_two_mistyped_keys_are_both_named(peft, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = peft("train", "quickstart", "optim.lrr=1", "modle=x")
    assert_said(result, 2, "'optim.lrr'", "did you mean: optim.lr", "'modle'", "did you mean: model")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_a_method(peft, recipe, made, tmp_path):
    result = peft("train", without(recipe, "method"))
    assert_said(result, 2, str(recipe), "method", "lora")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("group", ["model", "data", "task"])
def test_a_recipe_without_a_group_that_it_needs(peft, recipe, tmp_path, group):
    assert_said(peft("train", without(recipe, group)), 2, str(recipe), group)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["{type: classification, prompt: '{text}'}", "{type: generation, prompt: '{text}'}"])
def test_a_linear_probe_without_a_linear_head(peft, recipe, tmp_path, task):
    result = peft("train", recipe, "~method", "+method={name: linear_probe}", f"task={task}")
    assert_said(result, 2, "method linear_probe trains a linear head, and this task has none", "task.head=linear")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("how", ["--processes={}", "launch.processes={}"])
def test_more_processes_than_cores(peft, recipe, tmp_path, how):
    result = peft("train", recipe, how.format(cores() + 1))
    assert_said(result, 2, f"launch.processes={cores() + 1}, but this machine has {cores()} CPU cores", "allowed: 1")
    assert not (tmp_path / "runs").exists()


def test_no_processes_at_all(peft, recipe):
    assert_said(peft("train", recipe, "--processes=0"), 2, "launch.processes is 0, expected 1 or more")


@pytest.mark.parametrize("targets", ["attention.qq", "nonsense", "layers.99.q_proj"])
def test_a_target_that_matches_nothing(peft, recipe, made, targets):
    result = peft("train", recipe, f"method.targets=[{targets}]")
    assert_said(result, 1, "failed: dead-target", targets, "attention.q", "q_proj")
    assert made().status == "failed"
    assert not made().adapter.exists()


def test_one_dead_target_among_good_ones_is_named(peft, recipe):
    assert_said(peft("train", recipe, "method.targets=[attention.q,nonsense]"), 1, "dead-target", "nonsense")


def test_a_loss_that_is_no_number_keeps_the_checkpoint(peft, recipe, made):
    result = peft("train", recipe, *TOO_FAST, "training.save_every=1")
    assert_said(result, 1, "failed: non-finite-loss", "at step", "optim.lr", "checkpoint before it is kept")
    run = made()
    assert run.status == "failed"
    assert checkpoints.latest(run.checkpoints).progress.step >= 1
    assert not run.adapter.exists()
    assert "non-finite-loss" in run.page.read_text()


def test_pickled_weights_of_a_base_are_not_read(peft, recipe, checkpoint, tmp_path):
    folder = pickled(checkpoint, tmp_path / "pickled")
    result = peft("train", recipe, f"model.name={folder}")
    assert_said(result, 1, "failed: unsafe-weights", "pytorch_model.bin", "convert it to safetensors")
    assert not (folder / "was_run").exists()


def test_a_pickled_adapter_is_not_read(peft, trained, tmp_path):
    run = shutil.copytree(trained("words").path, tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_text(f"cos\nsystem\n(S'touch {run / 'was_run'}'\ntR.")
    for command in (["eval", run], ["predict", run, "--text", "a film"], ["merge", run, "--to", tmp_path / "merged"]):
        assert_said(peft(*command), 1, "failed: unsafe-weights", "adapter_model.bin", "can run any program")
    assert not (run / "was_run").exists()
    assert not (tmp_path / "merged").exists()


def test_an_adapter_on_another_base(peft, trained, checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    run, other = trained("words").path, shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    base = f"model.name={other}"
    to = tmp_path / "merged"
    for command in (["eval", run, base], ["predict", run, base, "--text", "a film"], ["merge", run, base, "--to", to]):
        assert_said(peft(*command), 1, "failed: base-mismatch", checkpoint.name, "--force")
    assert not to.exists()


@pytest.mark.parametrize(
    ("given", "option"),
    [
        (["model.source=hub", "model.name=nobody/nothing"], "model.source=folder"),
        (["~data.files", "data.source=hub", "+data.name=nobody/nothing"], "data.source=sample"),
    ],
    ids=["model", "data"],
)
def test_no_network_with_something_from_the_hub(recipe, tmp_path, given, option):
    """The hub's client reads its address when it is imported, so this takes a process of its own."""
    asked = {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path / "hf"), "PEFTCLI_CACHE": str(tmp_path / "cache")}
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    code = "from peftcli.cli.main import main; main()"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(recipe), *given],
        env=kept | asked, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert "Traceback" not in printed
    assert "nobody/nothing" in printed
    assert option in printed
    assert "sample" in printed
    assert time.monotonic() - began < 30  # most of it imports; a hub client that tries again takes minutes


def test_a_run_folder_that_cannot_be_written(peft, recipe, tmp_path, mounted):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "runs", mounted("ro,size=64k")):
        result = peft("train", recipe, f"output={place}")
        assert_said(result, 2, f"cannot write {place}", "output=FOLDER")
