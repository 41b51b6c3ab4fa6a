"""Whole runs of compressing: resumed exactly, no step at all, an adapter on top, by data and by weights."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftcli.artifacts.export import export
from peftcli.artifacts.remeasure import remeasure
from peftcli.artifacts.tuned import open_tuned
from peftcli.config.errors import UserError
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.rowcol.settings import Distill, Settings
from peftcli.models.loading import SEVERAL
from peftcli.training import costs
from peftcli.training.run import run
from tests import pictures


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    found = {
        "train": pictures.make_folder(folder / "train", {"good": 24, "bad": 24}),
        "test": pictures.make_folder(folder / "test", {"good": 8, "bad": 8}, first=500),
    }
    return found | {kind: pictures.make_checkpoint(folder / kind, kind) for kind in ("vit", "resnet")}


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Costs are timed for a moment only."""
    monkeypatch.setattr(costs, "SECONDS", 0.05)


@pytest.fixture
def make(places, tmp_path):
    def of(kind: str = "vit", base: Path | None = None, method=None, training=None, lr=3e-3, task=None, **settings):
        settings = {"mode": "compress", "target": {"parameters": "60%"}, **settings}
        files = {"train": places["train"], "test": places["test"]}
        return pictures.make_run(
            base or places[kind], files, tmp_path / "runs", method=method or Settings(**settings),
            optim={"lr": lr}, training=training or {}, task=task or {},
        )  # fmt: skip

    return of


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder.model / "model.safetensors")


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_ends_with_the_same_model(make):
    whole, cut, early = make(), make(), make()
    for folder in (whole, cut, early):
        run(folder.path, quiet=True)
    for folder, kept in ((cut, "step-00000004"), (early, "")):  # killed after the fourth step, and before the first
        for later in folder.checkpoints.glob("step-*"):
            if later.name != kept:
                shutil.rmtree(later)
        shutil.rmtree(folder.model)
        report = run(folder.path, quiet=True)
        assert report["run"]["status"] == "done"
        assert same(weights(folder), weights(whole))
        assert any(note.startswith("the backbone has") for note in report["data"]["notes"])


def test_what_was_found_before_the_first_step_holds_when_it_is_resumed(make):
    folder = make(target={"flops": "70%"}, prune=0.1, worth="sensitivity")
    run(folder.path, quiet=True)
    before = (folder.path / "start" / "found.json").read_text()
    shutil.rmtree(folder.checkpoints)
    first = weights(folder)
    run(folder.path, quiet=True)
    assert (folder.path / "start" / "found.json").read_text() == before
    assert same(weights(folder), first)


@pytest.mark.parametrize(
    ("steps", "settings"), [(0, {"worth": "sensitivity"}), (1, {"mode": "adapter", "target": {}, "rank": 4})], ids=str
)
def test_micro_batches_do_not_change_what_is_looked_at(make, steps, settings):
    found = []
    for micro in (None, 4):  # of batches of 6
        folder = make(training={"max_steps": steps, "micro_batch_size": micro}, calibration_batches=2, **settings)
        run(folder.path, quiet=True)
        [file] = [*folder.path.glob("model/*.safetensors"), *folder.path.glob("adapter/*.safetensors")]
        found.append(load_file(file))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor.abs(), found[1][name].abs(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_no_step_is_compression_alone(make, kind):
    folder = make(kind, training={"max_steps": 0})
    report = run(folder.path, quiet=True)
    names = [row["name"] for row in report["quality"]["rows"]]
    assert names == ["majority class", "tuned"]  # a new head: the base has no answer of its own
    start = load_file(folder.path / "start" / "found.safetensors")
    finished = open_tuned(folder.path).model.state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in finished.items())
    original, compressed = report["costs"]["rows"]
    assert (original["form"], compressed["form"]) == ("original", "compressed")
    for figure in ("parameters", "file_bytes", "flops"):
        assert compressed[figure] < original[figure], figure
    assert report["figures"][0]["title"] == "Used directions of each layer"
    assert len(report["figures"][0]["y"]) == 3


@pytest.mark.parametrize("kind", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_an_adapter_goes_on_top_of_a_compressed_model(make, kind, tmp_path):
    first = make(kind)
    run(first.path, quiet=True)
    role = "mlp" if kind == "vit" else "conv"
    second = make(base=first.model, method=Lora(r=2, targets=[role]), lr=0.02)
    report = run(second.path, quiet=True)
    assert [row["name"] for row in report["quality"]["rows"]] == ["untouched base", "majority class", "tuned"]
    before = next(r["metrics"] for r in first.read_report()["quality"]["rows"] if r["name"] == "tuned")
    assert report["quality"]["rows"][0]["metrics"]["loss"] == pytest.approx(before["loss"], rel=1e-4)
    names = load_file(second.adapter / "adapter_model.safetensors").keys()
    assert any(".reduce." in name for name in names)
    assert any(".expand." in name for name in names)
    tuned = open_tuned(second.path)
    assert not any(remeasure(tuned, [])["difference"].values())
    assert export(second.path, tmp_path / "merged")["reload"]["agreement"] == 1


def test_several_labels_are_learnt_from_the_original_one_by_one(make):
    several = {"multilabel": True, "best_metric": "loss"}
    first = make(task=several, training={"max_steps": 2})
    run(first.path, quiet=True)
    second = make(base=first.model, task=several, training={"max_steps": 2}, distill=Distill(features=0.0))
    run(second.path, quiet=True)
    assert open_tuned(second.path).model.config.problem_type == SEVERAL
    step = next(row for row in second.metrics() if row.get("distil_kl") is not None)
    assert 0 < step["distil_kl"] < 2.0**2 * math.log(2)


@pytest.mark.slow
def test_a_compressed_model_is_compressed_again(make):
    first = make(training={"max_steps": 2})
    run(first.path, quiet=True)
    second = make(base=first.model, training={"max_steps": 2}, target={"parameters": "70%"})
    report = run(second.path, quiet=True)
    original, compressed = report["costs"]["rows"]
    assert compressed["parameters"] < original["parameters"]
    tuned = open_tuned(second.path)
    assert not any(remeasure(tuned, [])["difference"].values())


def test_too_few_pictures_are_said(places, tmp_path):
    method = Settings(mode="compress", target={"parameters": "60%"}, calibration_batches=1)
    files = {"train": places["train"], "test": places["test"]}
    folder = pictures.make_run(places["vit"], files, tmp_path / "runs", method=method, training={"batch_size": 1})
    with pytest.raises(UserError, match="may get up to 19 directions, and the calibration rows have 17 positions"):
        run(folder.path, quiet=True)
