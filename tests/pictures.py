"""Folders of pictures that a tiny model can tell apart, and checkpoints of tiny models of pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import (
    DataConfig,
    ImageConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.testing import tiny

LABELS = ("good", "bad")


def draw(label: str, number: int, size: tuple[int, int] = (20, 24)) -> np.ndarray:
    """A dark, noisy picture, with a white spot where it is bad: uint8 [H, W, 3]."""
    dice = np.random.default_rng([number, LABELS.index(label)])
    pixels_HWC = dice.integers(0, 120, (*size, 3), dtype=np.uint8)
    if label == "bad":
        top, left = dice.integers(2, 8, 2)
        pixels_HWC[top : top + 8, left : left + 8] = 255
    return pixels_HWC


def make_folder(folder: Path, counts: dict[str, int], first: int = 0) -> Path:
    """A sub-folder for each label, with so many pictures."""
    for label, count in counts.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            Image.fromarray(draw(label, number)).save(folder / label / f"{number:03}.png")
    return folder


def make_listing(folder: Path, name: str = "rows.csv") -> Path:
    """A csv or jsonl file beside such sub-folders that names their pictures by relative paths."""
    rows = [{"image": p.relative_to(folder).as_posix(), "label": p.parent.name} for p in sorted(folder.rglob("*.png"))]
    with (folder / name).open("w", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["image", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return folder / name


def make_checkpoint(folder: Path, kind: str = "vit", **shape: Any) -> Path:
    """A tiny model of pictures with random weights, as Transformers writes it, without a head for our labels."""
    import torch
    from transformers import Dinov2ForImageClassification, ResNetForImageClassification, ViTForImageClassification

    torch.manual_seed(0)
    if kind == "resnet":
        model: Any = ResNetForImageClassification(tiny.resnet_shape(**shape))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    elif kind == "dinov2":
        model = Dinov2ForImageClassification(tiny.dinov2().model.config)
    else:
        model = ViTForImageClassification(tiny.vit_shape(**shape))
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    about = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [0.3] * 3, "image_std": [0.3] * 3}
    if kind == "dinov2":
        about["crop_size"] = about["size"]  # its processor cuts 224 pixels where nothing is said
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


def make_run(checkpoint: Path, files: dict[str, Any], output: Path, *, method=None, seed=0, **groups: Any) -> RunFolder:
    """A run folder over pictures; groups are changed by dictionaries: `task={"positive": "bad"}`."""
    config = RunConfig(
        model=replace(ModelConfig(name=str(checkpoint), source="folder"), **groups.get("model", {})),
        data=replace(
            DataConfig(source="files", files={split: str(path) for split, path in files.items()}),
            **groups.get("data", {}),
        ),
        method=method or Lora(r=2, dropout=0.1),
        task=replace(ImageConfig(), **groups.get("task", {})),
        optim=replace(OptimConfig(lr=0.02), **groups.get("optim", {})),
        training=replace(
            TrainingConfig(max_steps=8, batch_size=6, eval_every=4, precision="fp32"), **groups.get("training", {})
        ),
        launch=replace(LaunchConfig(device="cpu", threads=1), **groups.get("launch", {})),
        name="trial",
        seed=seed,
        output=str(output),
    )
    return RunFolder.create(config)
