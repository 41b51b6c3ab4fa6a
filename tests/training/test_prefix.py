"""Frozen beginnings that are computed once: the same run as without, whatever is trained behind them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftcli.config.schema import AugmentConfig
from peftcli.methods.linear_probe.settings import Settings as LinearProbe
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.sparse_adapter.settings import Settings as Sparse
from peftcli.models import prefix
from peftcli.testing import tiny
from peftcli.training.run import run
from tests import pictures

ROUNDING = 1e-6
"""Of losses of about one, in float32: rows are computed beside others, which may change the order of additions. What
was seen is 0."""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pictures")
    found = {
        "train": pictures.make_folder(folder / "train", {"good": 20, "bad": 12}),
        "test": pictures.make_folder(folder / "test", {"good": 8, "bad": 8}, first=500),
    }
    shapes = {"vit": {"num_hidden_layers": 4}, "dinov2": {}, "resnet": {}}
    for kind, shape in shapes.items():
        found[kind] = pictures.make_checkpoint(folder / kind, kind, **shape)
    return found


@pytest.fixture
def make(places, tmp_path):
    def of(kind: str, cached: bool | str, **more):
        training = {"max_steps": 20, "cache_features": cached, **more.pop("training", {})}
        files = {"train": places["train"], "test": places["test"]}
        return pictures.make_run(places[kind], files, tmp_path / "runs", training=training, **more)

    return of


def losses(folder) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in folder.metrics() if "loss" in row], dtype=torch.float64)


def measured(folder) -> torch.Tensor:
    return torch.tensor([row["validation"]["loss"] for row in folder.metrics() if "validation" in row])


def saved(folder) -> dict[str, torch.Tensor]:
    return load_file(folder.adapter / "adapter_model.safetensors")


def said(folder) -> list[str]:
    return [line[9:] for line in folder.log_file.read_text().splitlines() if "cached prefix" in line]


LATE = {"r": 4, "last_blocks": 1, "dropout": 0.2}
CASES = {
    "vit-lora": ("vit", Lora(r=2, dropout=0.2, targets=["layers.2.attention.q_proj", "layers.3.mlp.fc1"]), "0-1 of 4"),
    "vit-probe": ("vit", LinearProbe(), "all 4 blocks"),
    "resnet-sparse": ("resnet", Sparse(**LATE), "0-1 of 3"),
    "vit-sparse": ("vit", Sparse(**LATE), "0-2 of 4"),
    "dinov2-sparse": ("dinov2", Sparse(**LATE), "0-0 of 2"),
    "resnet-probe": ("resnet", LinearProbe(), "all 3 blocks"),
}
QUICK = ("vit-lora", "resnet-sparse")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_the_same_run_with_and_without(make, case) -> None:
    kind, method, told = CASES[case]
    without, kept = (make(kind, cached, method=method) for cached in (False, "auto"))
    reports = [run(folder.path, quiet=True) for folder in (without, kept)]
    assert said(without) == []
    hits = [note for note in said(kept) if ": cached prefix: " in note]
    assert hits
    assert all(told in note for note in hits)
    assert set(hits) <= set(reports[1]["data"]["notes"])
    torch.testing.assert_close(losses(kept), losses(without), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(measured(kept), measured(without), atol=ROUNDING, rtol=0)
    mine, theirs = saved(kept), saved(without)
    assert mine.keys() == theirs.keys()
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def _forget(folder, step: int) -> None:
    """Leave the checkpoint at a step alone, as if the run had been killed right after it."""
    for later in folder.checkpoints.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


def test_a_resumed_run_is_the_same_bit_for_bit(make) -> None:
    more = {
        "method": Lora(r=2, dropout=0.3, targets=["layers.3.mlp.fc1"]),
        "training": {"keep_checkpoints": 9, "max_steps": 12},
    }
    whole, cut = make("vit", "auto", **more), make("vit", "auto", **more)
    for folder in (whole, cut):
        run(folder.path, quiet=True)
    _forget(cut, 8)
    run(cut.path, quiet=True)
    assert len(said(cut)) == 2
    assert torch.equal(losses(cut), losses(whole))
    assert all(torch.equal(tensor, saved(whole)[name]) for name, tensor in saved(cut).items())


def test_a_resumed_stage_does_as_it_began(make, monkeypatch) -> None:
    folder = make("vit", "auto", method=LinearProbe(), training={"keep_checkpoints": 9, "max_steps": 12})
    monkeypatch.setattr("peftcli.training.prefix.FREE_SHARE", 0.0)
    run(folder.path, quiet=True)
    assert "would be more than a quarter of the free memory" in said(folder)[0]
    monkeypatch.undo()
    _forget(folder, 8)
    run(folder.path, quiet=True)
    assert len(said(folder)) == 1


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"task": {"augment": AugmentConfig(flip=True)}}, "training pictures are changed at random"),
        ({"method": Lora(r=2)}, ": vit.layers.0.attention.q_proj.lora_A.default is trained, and there is no whole"),
        ({"training": {"max_steps": 4}}, "train: no cached prefix: its 4 steps see no picture twice"),
        ({"model": {"name": "dropout"}}, "there is dropout in the first block, or before it"),
    ],
    ids=["augmented", "first-block", "short", "dropout"],
)
def test_what_cannot_be_kept_is_said(make, places, tmp_path, more, why) -> None:
    if "model" in more:
        about = json.loads((places["vit"] / "config.json").read_text())
        shutil.copytree(places["vit"], tmp_path / "dropout")
        (tmp_path / "dropout/config.json").write_text(json.dumps({**about, "hidden_dropout_prob": 0.1}))
        more = {"model": {"name": str(tmp_path / "dropout")}}
    folder = make("vit", "auto", **{"method": LinearProbe(), "training": {"max_steps": 6}, **more})
    report = run(folder.path, quiet=True)
    assert len(said(folder)) == 1
    assert why in said(folder)[0]
    assert not any("cached" in note for note in report["data"]["notes"])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_way_in_leaves_no_trace(kind) -> None:
    base = getattr(tiny, kind)()
    model, family, pixels_BCSS = base.model, base.family, base.batch["pixel_values"]
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    last = [name for name, _ in model.named_modules() if re.fullmatch(rf".*\.(?:{family.blocks})", name)][-1]
    model.get_submodule(last).requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    model.train()
    cut = prefix.find(model, family, pixels_BCSS)
    assert cut.place == last
    whole_BK = model(pixel_values=pixels_BCSS).logits
    with prefix.entered(cut):
        state = prefix.hidden(cut, pixels_BCSS)
        assert cut.takes(state)
        assert not state.requires_grad
        short_BK = model(pixel_values=state).logits
        assert torch.equal(model(pixel_values=pixels_BCSS).logits, whole_BK)
    assert torch.equal(short_BK, whole_BK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training or "BatchNorm" in type(module).__name__ for module in model.modules())


def test_a_model_that_goes_another_way_is_not_entered() -> None:
    base = tiny.vit()
    base.model.classifier.requires_grad_(True)

    def look_again(module, args, kwargs, output):
        output.logits = output.logits + kwargs["pixel_values"].mean()

    base.model.register_forward_hook(look_again, with_kwargs=True)
    with pytest.raises(prefix.Nowhere, match="computes something else when it is entered at classifier"):
        prefix.find(base.model, base.family, base.batch["pixel_values"])
