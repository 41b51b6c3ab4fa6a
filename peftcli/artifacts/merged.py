"""A merged model, opened to be asked: its folder alone, without the run that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.artifacts import adapter
from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import Tuned, choose_device
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import LaunchConfig, ModelConfig
from peftcli.config.validate import validate
from peftcli.models import loading, mamba_mixer, precision
from peftcli.tasks import registry as tasks


def is_merged(path: Path) -> bool:
    """Whether it is the folder of a merged model, or a copy of what a run without an adapter left."""
    return all((path / name).is_file() for name in ("config.json", adapter.LINEAGE))


def open_merged(path: Path) -> Tuned:
    """Load a merged model with the task that its lineage describes.

    Raises:
        UserError: Its lineage names no task, or one that this version does not know.
        CheckFailed: `unsafe-weights` or `adapter-keys`.
    """
    lineage = adapter.read_lineage(path)
    if not lineage.get("task"):
        raise UserError(Mistake(f"{path / adapter.LINEAGE} does not say what the model was trained for"))
    if lineage["task"]["type"] == "episodes":
        hint = f"ask it by the lines of {path / 'README.md'}, or ask the run: peft predict RUN --support FILE"
        raise UserError(Mistake(f"{path} is the model of one few-shot task, with prototypes beside it", hint=hint))
    tree = {
        "model": {"name": str(path), "source": "folder"},
        "data": {"source": "files", "files": {"train": str(path)}},
        "method": {"name": "full"},
        "task": lineage["task"],
    }
    checked = validate(tree, lambda key: str(path / adapter.LINEAGE))
    if checked.mistakes:
        raise UserError(*checked.mistakes)
    task, device = tasks.build(checked.config.task), choose_device(LaunchConfig())
    task.recall(lineage)
    model: Any = adapter.load_model(loading.auto_class(task.architecture), path, dtype="auto")
    model = model.to(device)
    mamba_mixer.install(model)
    half = next((name for name, dtype in precision.DTYPES.items() if dtype == model.dtype), "fp32")
    chosen = "fp32" if half == "fp16" and device == "cpu" else half
    reader = task.reader(ModelConfig(str(path), source="folder"))
    return Tuned(RunFolder(path), checked.config, model.eval(), task, reader, lineage, device, chosen)  # type: ignore[arg-type]
