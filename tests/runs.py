"""Run folders over a tiny checkpoint, ready to be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import (
    ClassificationConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)
from peftcli.methods.lora.settings import Settings as Lora


def make_run(
    checkpoint: Path, rows: dict[str, str], output: Path, *, method=None, task=None, data=None, seed=0, **groups: Any
) -> RunFolder:
    """A run folder; groups are changed by dictionaries: `training={"max_steps": 3}`, `optim={...}`, `launch={...}`.

    Args:
        checkpoint: The base model's folder.
        rows: Files of rows by split.
        output: Where the run folder goes.
        method: Settings of a method; LoRA if not given.
        task: A whole task, or changes to the classification by label words.
        data: Changes to the rows' group.
        seed: The run's.
        groups: The other groups.
    """
    words = ClassificationConfig(prompt="{text} Sentiment:")
    config = RunConfig(
        model=replace(ModelConfig(name=str(checkpoint), source="folder"), **groups.get("model", {})),
        data=replace(DataConfig(source="files", files=rows), **(data or {})),
        method=method or Lora(r=2, dropout=0.1),
        task=replace(words, **(task or {})) if isinstance(task, dict | None) else task,
        optim=replace(OptimConfig(lr=0.02), **groups.get("optim", {})),
        training=replace(
            TrainingConfig(max_steps=8, batch_size=6, eval_every=3, precision="fp32", baselines=False),
            **groups.get("training", {}),
        ),
        launch=replace(LaunchConfig(device="cpu", threads=1), **groups.get("launch", {})),
        name="trial",
        seed=seed,
        output=str(output),
    )
    return RunFolder.create(config)
