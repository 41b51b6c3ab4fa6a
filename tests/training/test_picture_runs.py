"""Whole runs over folders of pictures: trained, resumed, measured again, merged, asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftcli.artifacts.export import export
from peftcli.artifacts.merged import open_merged
from peftcli.artifacts.picture_answers import answer_pictures
from peftcli.artifacts.remeasure import remeasure
from peftcli.artifacts.tuned import open_tuned
from peftcli.config import frozen
from peftcli.config.schema import AugmentConfig
from peftcli.data.sampler import BatchSampler
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.linear_probe.settings import Settings as LinearProbe
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.training import prepare
from peftcli.training.feed import Feed
from peftcli.training.run import run
from tests import pictures


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    found = {
        "train": pictures.make_folder(folder / "train", {"good": 20, "bad": 12}),
        "test": pictures.make_folder(folder / "test", {"good": 8, "bad": 8}, first=500),
    }
    for kind in ("vit", "dinov2", "resnet"):
        found[kind] = pictures.make_checkpoint(folder / kind, kind)
    return found


@pytest.fixture
def make(places, tmp_path):
    def of(kind: str = "vit", **more):
        return pictures.make_run(
            places[kind], {"train": places["train"], "test": places["test"]}, tmp_path / "runs", **more
        )

    return of


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("vit", Lora(r=4, targets=["all"])),
        pytest.param("dinov2", Lora(r=4), marks=pytest.mark.slow),
        ("resnet", Lora(r=4, targets=["conv"])),
        pytest.param("dinov2", Full(), marks=pytest.mark.slow),
        pytest.param("resnet", LinearProbe(), marks=pytest.mark.slow),
        pytest.param("resnet", Full(), marks=pytest.mark.slow),
    ],
    ids=lambda one: one if isinstance(one, str) else one.name,
)
def test_a_run_learns_and_is_found_again(make, places, tmp_path, kind, method) -> None:
    folder = make(
        kind, method=method, task={"positive": "bad", "best_metric": "auroc"}, training={"max_steps": 30},
        optim={"lr": 3e-3 if method.name == "full" else 0.02},
    )  # fmt: skip
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    rows = {row["name"]: row["metrics"] for row in report["quality"]["rows"]}
    assert rows["tuned"]["auroc"] > (0.7 if method.name == "linear_probe" else 0.9)
    assert rows["majority class"]["accuracy"] == 0.5
    tuned = open_tuned(folder.path)
    assert remeasure(tuned, [])["difference"] == dict.fromkeys(rows["tuned"], 0.0)
    answers, notes, pace = answer_pictures(tuned, places["test"])
    assert (len(answers), notes, pace.pictures) == (16, [], 16)
    said = {row["image"]: row["predicted"] for row in answers}
    assert sum(name.startswith(label) for name, label in said.items()) == pytest.approx(16 * rows["tuned"]["accuracy"])
    assert {row["score"] for row in answers} == {row["probabilities"]["bad"] for row in answers}
    if method.name != "full":
        assert export(folder.path, tmp_path / "merged")["reload"]["agreement"] == 1
        merged = open_merged(tmp_path / "merged")
        assert merged.task.alarms == tuned.task.alarms
        assert {row["image"]: row["predicted"] for row in answer_pictures(merged, places["test"])[0]} == said


def test_rows_that_cannot_be_read_are_not_compared(places, tmp_path) -> None:
    shutil.copytree(places["test"], tmp_path / "test")
    for broken in sorted((tmp_path / "test" / "bad").iterdir())[1:]:
        broken.write_bytes(b"no picture")
    files = {"train": places["train"], "test": tmp_path / "test"}
    folder = pictures.make_run(places["vit"], files, tmp_path / "runs", method=LinearProbe(), data={"bad_rows": "skip"})
    report = run(folder.path, quiet=True)
    found = {row["name"]: row["metrics"] for row in report["quality"]["rows"]}
    assert found["majority class"]["accuracy"] == pytest.approx(8 / 9)  # of 16 rows: 8 / 16


def test_pictures_of_another_size_than_the_models(make, tmp_path) -> None:
    folder = make(task={"image_size": 24}, method=Lora(r=4))
    assert run(folder.path, quiet=True)["run"]["status"] == "done"
    export(folder.path, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["image_size"] == 24
    assert load_file(tmp_path / "merged/model.safetensors")["vit.embeddings.position_embeddings"].shape[1] == 37


def test_a_resumed_run_sees_the_same_augmented_batches(make) -> None:
    change = AugmentConfig(flip=True, crop=0.5, colour=0.3, mixup=0.2)
    more = {"task": {"augment": change, "balanced_sampling": True}, "method": Lora(r=2, dropout=0.3)}
    whole, cut = make(**more), make(**more)
    run(whole.path, quiet=True)
    run(cut.path, quiet=True)
    for later in cut.checkpoints.glob("step-*"):
        if later.name != "step-00000004":
            for file in later.iterdir():
                file.unlink()
            later.rmdir()
    run(cut.path, quiet=True)
    assert torch.equal(*(_trained(one) for one in (whole, cut)))


@pytest.mark.parametrize("change", [AugmentConfig(mixup=0.5), AugmentConfig(flip=True, mixup=0.5, cutmix=1.0)])
def test_what_is_mixed_does_not_depend_on_micro_batches_or_processes(make, change) -> None:
    config = frozen.load(make(task={"augment": change}, training={"batch_size": 7}).config)
    material = prepare.load_material(config)
    lengths, task, reader = material.train.lengths, material.task, material.tokenizer

    def batches(micro: int | None, world: int, position: int) -> dict[bytes, list[float]]:
        """Each picture of a step, and its labels."""
        small = replace(config, training=replace(config.training, micro_batch_size=micro))
        sampler = BatchSampler(lengths, 7, None, False, 5)
        feeds = [Feed(material.train, sampler, task, reader, small, rank, world) for rank in range(world)]
        parts = [batch for feed in feeds for batch in feed.micro_batches(1, position)]
        pairs = [pair for part in parts for pair in zip(part["pixel_values"], part["labels"], strict=True)]
        return {pixels.numpy().tobytes(): labels.tolist() for pixels, labels in pairs}

    assert len({str(sorted(batches(None, 1, position).values())) for position in range(4)}) == 4
    for position in range(4):
        whole = batches(None, 1, position)
        assert len(whole) == 7
        assert whole == batches(2, 1, position) == batches(3, 2, position)


def _trained(folder) -> torch.Tensor:
    found = load_file(folder.adapter / "adapter_model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def test_batch_norm_rests_by_default(make) -> None:
    folder = make("resnet", method=Full(), training={"max_steps": 3})
    run(folder.path, quiet=True)
    before, after = (load_file(p / "model.safetensors") for p in (Path(_base(folder)), folder.model))
    still = [name for name in before if "running" in name or "num_batches" in name]
    assert len(still) > 20
    assert all(torch.equal(before[name], after[name]) for name in still)
    assert not torch.equal(
        before["resnet.embedder.embedder.normalization.weight"], after["resnet.embedder.embedder.normalization.weight"]
    )


@pytest.mark.parametrize("method", [Lora(r=2), Full()], ids=["lora", "full"])
def test_a_trained_batch_norm_is_saved_with_its_statistics(make, method) -> None:
    folder = make(
        "resnet", method=method, model={"batch_norm": "trained"}, training={"max_steps": 5, "keep_best": False}
    )
    report = run(folder.path, quiet=True)
    saved = load_file((folder.adapter if method.name == "lora" else folder.model) / _weights(method))
    seen = [value for name, value in saved.items() if name.endswith("num_batches_tracked")]
    assert seen
    assert all(value == 5 for value in seen)
    rows = {row["name"]: row["metrics"] for row in report["quality"]["rows"]}
    assert remeasure(open_tuned(folder.path), [])["quality"]["rows"][-1]["metrics"] == rows["tuned"]


@pytest.mark.slow
def test_a_trained_batch_norm_resumes_exactly(make) -> None:
    whole, cut = (make("resnet", model={"batch_norm": "trained"}) for _ in range(2))
    run(whole.path, quiet=True)
    run(cut.path, quiet=True)
    for file in (cut.checkpoints / "step-00000008").iterdir():
        file.unlink()
    (cut.checkpoints / "step-00000008").rmdir()
    run(cut.path, quiet=True)
    assert torch.equal(*(_trained(one) for one in (whole, cut)))


def _base(folder) -> str:
    return frozen.load(folder.config).model.name


def _weights(method) -> str:
    return "adapter_model.safetensors" if method.name == "lora" else "model.safetensors"
