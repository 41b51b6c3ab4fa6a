"""A finished run, opened to be used: its base, what was trained on it, and its task with the labels it has learnt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from peftcli.artifacts import adapter
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import rerun
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import LaunchConfig, ModelConfig, RunConfig
from peftcli.models import loading, mamba_mixer
from peftcli.models.precision import Precision, choose
from peftcli.tasks import registry as tasks
from peftcli.tasks.contract import Task


@dataclass(frozen=True)
class Tuned:
    """A tuned model and all that it takes to ask it something.

    Attributes:
        run: Its folder.
        config: The run's config, with the overrides it was opened with.
        model: The base with the adapter on it, or the trained model of a method that is no adapter.
        task: With the labels of training.
        tokenizer: The base's, or the one saved with a trained model.
        lineage: Where the weights come from.
        device: Where the model is.
        precision: Arithmetic of its forward pass, that of training where the hardware is the same.
    """

    run: RunFolder
    config: RunConfig
    model: Any
    task: Task
    tokenizer: Any
    lineage: dict[str, Any]
    device: str
    precision: Precision

    @property
    def forced_base(self) -> list[str]:
        """Base tensors that are not those of training; only with force there are any."""
        return getattr(self.model, "forced_base", [])

    @contextmanager
    def untouched(self) -> Iterator[nn.Module]:
        """The base as it was before training."""
        if isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                yield self.model
        else:
            yield load_base(self.config, self.task, self.device).model


def open_tuned(path: str | Path, overrides: Sequence[str] = (), *, force: bool = False) -> Tuned:
    """Load what a finished run has trained, by the run's own config.

    Args:
        path: The run's folder, or the adapter's or model's folder in it.
        overrides: As `peftcli.config.rerun.load` allows.
        force: Use the base although its weights are not those that the adapter was trained on.

    Raises:
        UserError: No run there, or one that has not ended, or its base is not on this machine.
        CheckFailed: `unsafe-weights`, `adapter-keys` or `base-mismatch`.
    """
    run = find(path)
    if run.status != "done":
        what = f"{run.path} is {run.status}, so it has no tuned model yet"
        raise UserError(Mistake(what, hint=f"continue it to its end: peft train --resume {run.path}"))
    config = rerun.load(run.config, overrides)
    device = choose_device(config.launch)
    whole = run.model.is_dir() and not run.adapter.is_dir()
    folder = run.model if whole else run.adapter
    if not whole:
        adapter.read_config(folder)  # a missing or unsafe adapter is told before a large base is read
    lineage = adapter.read_lineage(folder)
    task = tasks.build(config.task, config.seed)
    _check_labels(lineage, config, folder)
    task.recall(lineage)
    if whole:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = {"dtype": "auto", "attn_implementation": loading.attention(config.model, shape)}
        model: Any = adapter.load_model(loading.auto_class(task.architecture), folder, **settings)
        model = model.to(device)
        mamba_mixer.install(model)
        words = task.reader(ModelConfig(str(folder), source="folder"))
    else:
        loaded = load_base(config, task, device)
        model, words = adapter.load(loaded.model, folder, force=force).to(device), loaded.tokenizer
        if words is None:
            raise UserError(Mistake(f"{config.model.name} has no tokenizer on this machine", "model.name"))
    chosen = choose(config.training.precision, device)
    return Tuned(run, config, model.eval(), task, words, lineage, device, chosen)


def find(path: str | Path) -> RunFolder:
    """The run folder at a path, or around the adapter's or model's folder at it.

    Raises:
        UserError: There is none.
    """
    path = Path(path).expanduser()
    is_part = path.absolute().name in ("adapter", "model") and not (path / "config.yaml").is_file()
    if is_part and (path.absolute().parent / "config.yaml").is_file():
        path = path.parent if path.name else path.absolute().parent
    return RunFolder.open(path)


def choose_device(launch: LaunchConfig) -> str:
    """The hardware that training would take.

    Raises:
        UserError: The config insists on hardware that is not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if launch.device == "auto" or launch.type == "slurm":  # the nodes' device says nothing of this machine
        return next(name for name, there in here.items() if there)
    if not here[launch.device]:
        hint = "launch.device=cpu runs everywhere"
        raise UserError(Mistake(f"launch.device={launch.device}, but PyTorch sees none here", hint=hint))
    return launch.device


def load_base(config: RunConfig, task: Task, device: str) -> loading.LoadedModel:
    """The untouched base, in the type it had in training."""
    chosen = choose(config.training.precision, device)
    return loading.load(
        config.model,
        chosen,
        task.architecture,
        task.labels,
        device=device,
        image_size=task.image_size,
        several_labels=task.several_labels,
    )


def _check_labels(lineage: dict[str, Any], config: RunConfig, folder: Path) -> None:
    if lineage.get("labels") is None and config.task.type in ("classification", "images"):
        what = f"{folder / adapter.LINEAGE} does not say which labels were learnt"
        raise UserError(Mistake(what, hint="train it again with this version: the order of the labels is not known"))
