"""Domains of tiny pictures and texts for few-shot tasks, models without heads, and runs over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import (
    DataConfig,
    DomainConfig,
    EpisodesConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)
from peftcli.methods import episodes
from peftcli.methods.episodes import Episode
from peftcli.methods.smat.settings import Settings as Smat
from peftcli.models import features
from peftcli.testing import tiny
from peftcli.testing.tiny import Base

KINDS = {
    "vit": (tiny.vit, "image-classification"),
    "resnet": (tiny.resnet, "image-classification"),
    "llama": (tiny.llama, "sequence-classification"),
    "mamba": (tiny.mamba, "sequence-classification"),
}


def headless(kind: str, dtype: torch.dtype = torch.float64) -> Base:
    """A tiny base whose logits are its pooled features."""
    make, architecture = KINDS[kind]
    base = make(dtype, architecture)
    if hasattr(base.model, "score"):
        features.take_off_head(base.model)
    elif kind == "vit":
        base.model.classifier = torch.nn.Identity()
    else:
        base.model.classifier[-1] = torch.nn.Identity()
    return base


def episode(kind: str, ways: int = 3, shots: int = 3, queries: int = 2, seed: int = 0, dtype=torch.float64) -> Episode:
    """A task of noise around a pattern for each class; support first, class by class."""
    dice = torch.Generator().manual_seed(seed)
    classes = torch.cat([torch.arange(ways).repeat_interleave(count) for count in (shots, queries)])
    if kind in ("vit", "resnet"):
        patterns = torch.randn(ways, 3, tiny.PIXELS, tiny.PIXELS, generator=dice)
        noise = torch.randn(len(classes), 3, tiny.PIXELS, tiny.PIXELS, generator=dice)
        inputs = {"pixel_values": (patterns[classes] + noise).to(dtype)}
    else:
        patterns = torch.randint(1, tiny.WORDS, (ways, 8), generator=dice)
        other = torch.randint(1, tiny.WORDS, (len(classes), 8), generator=dice)
        ids = torch.where(torch.rand(other.shape, generator=dice) < 0.5, patterns[classes], other)
        ids[0, 6:] = 0
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return Episode(inputs, classes, ways * shots, ways)


@dataclass(frozen=True)
class FewShot(Base):
    """A base that is asked a whole task.

    Attributes:
        task: Its support is shown before its query is asked.
    """

    task: Episode

    def outputs(self, model: Any) -> torch.Tensor:
        return episodes.logits(model, self.task)

    def loss(self, model: Any) -> torch.Tensor:
        return episodes.loss(model, self.task)


def base_of(kind: str, dtype: torch.dtype = torch.float64, architecture: str = "") -> FewShot:
    """As the bases of `peftcli.testing.tiny`."""
    base = headless(kind, dtype)
    return FewShot(base.model, base.family, base.batch, base.targets, episode(kind, dtype=dtype))


def make_domain(folder: Path, classes: int, rows: int, seed: int) -> Path:
    """A sub-folder for each class: noise around a pattern of its own."""
    for number in range(classes):
        dice = np.random.default_rng([seed, number])
        pattern = dice.integers(0, 256, (4, 4, 3)).repeat(4, 0).repeat(4, 1)
        place = folder / f"class{number}"
        place.mkdir(parents=True)
        for row in range(rows):
            noisy = np.clip(pattern + dice.normal(0, 60, pattern.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(place / f"{row}.png")
    return folder


def domain(folder: Path, **more: Any) -> DomainConfig:
    return DomainConfig(source="files", files={"train": str(folder)}, **more)


def make_run(
    checkpoint: Path,
    domains: dict[str, DomainConfig],
    output: Path,
    *,
    method: Any = None,
    seed: int = 0,
    **groups: Any,
) -> RunFolder:
    """A run folder over domains of pictures; groups are changed by dictionaries: `task={"queries": 2}`."""
    task = EpisodesConfig(
        image_size=16, ways=(2, 4), support=12, class_support=4, queries=2, episodes=16, validation_episodes=4,
        test_episodes=5,
    )  # fmt: skip
    config = RunConfig(
        model=ModelConfig(name=str(checkpoint), source="folder"),
        data=replace(
            DataConfig(source="domains", domains=domains, validation_share=0.2, test_share=0.25),
            **groups.get("data", {}),
        ),
        method=method or Smat(experts=2, sparsity=0.5),
        task=replace(task, **groups.get("task", {})),
        optim=replace(OptimConfig(lr=1e-3), **groups.get("optim", {})),
        training=replace(
            TrainingConfig(max_steps=8, batch_size=2, micro_batch_size=1, eval_every=4, precision="fp32"),
            **groups.get("training", {}),
        ),
        launch=replace(LaunchConfig(device="cpu", threads=1), **groups.get("launch", {})),
        name="trial",
        seed=seed,
        output=str(output),
    )
    return RunFolder.create(config)
