"""Picture recipes whose base is at the hub: two steps with random weights on generated pictures, and no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from peftcli.config import catalog
from peftcli.config.compose import compose
from tests.pictures import make_folder

NAMES = sorted(name for name in catalog.recipes() if name.startswith(("vit/cifar10", "vit/imagenet", "resnet/")))
HUB = [name for name in NAMES if compose(name).config.model.source == "hub"]
QUICK = ("vit/cifar10_lora", "resnet/imagenet_sparse_adapter")
SHAPES = {
    "vit": ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=4"],
    "resnet": ["embedding_size=8", "hidden_sizes=[16,32]", "depths=[2,1]"],
}
SHORT = [
    "model.weights=random", "training.max_steps=2", "training.batch_size=6", "training.micro_batch_size=4",
    "training.eval_every=end", "launch.device=cpu", "launch.threads=1", "task.image_size=32",
]  # fmt: skip


def test_both_families_have_recipes_for_the_hub() -> None:
    assert {name.partition("/")[0] for name in HUB} == {"vit", "resnet"}
    assert set(QUICK) <= set(HUB)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HUB])
def test_a_recipe_is_rehearsed_with_random_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.training.run import run

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    files = [
        f"data.files.{split}={make_folder(tmp_path / split, {'good': 12, 'bad': 12}, first)}"
        for split, first in (("train", 0), ("test", 100))
    ]
    shape = [f"model.shape.{part}" for part in SHAPES[name.partition("/")[0]]]
    overrides = [*SHORT, *shape, "data=imagefolder", *files, f"output={tmp_path}"]
    composed = compose(name, overrides)
    folder = RunFolder.create(composed.config, composed.overrides)
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    before = ["before training"] if "compress" in name else []
    assert [row["name"] for row in report["quality"]["rows"]] == ["majority class", *before, "tuned"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HUB if "imagenet_rowcol" in name])
def test_the_full_size_is_counted_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.training.estimate import estimate

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = estimate(compose(name, ["model.weights=random", "launch.device=cpu"]).config)
    assert 0 < found.parameters["trainable"] <= found.parameters["total"]
    assert found.peak < 24 * 2**30
