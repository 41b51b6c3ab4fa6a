"""A merged model, opened to be asked: its folder alone, without the run that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel

from peftcli.artifacts import adapter, few_shot_merge
from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import Tuned, choose_device
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import LaunchConfig, ModelConfig
from peftcli.config.validate import validate
from peftcli.models import features, loading, mamba_mixer, precision
from peftcli.tasks import registry as tasks
from peftcli.tasks.episodes.support import Known
from peftcli.tasks.episodes.task import EpisodesTask


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
    of_task = lineage["task"]["type"] == "episodes"
    if of_task and not lineage.get("labels"):
        hint = "ask the run: peft predict RUN --support FOLDER"
        raise UserError(Mistake(f"{path} is a few-shot model by itself, and knows no classes", hint=hint))
    rows = {"source": "files", "files": {"train": str(path)}}
    tree = {
        "model": {"name": str(path), "source": "folder"},
        "data": {"source": "domains", "domains": {"mine": rows}} if of_task else rows,
        "method": {"name": "full"},
        "task": lineage["task"],
    }
    checked = validate(tree, lambda key: str(path / adapter.LINEAGE))
    if checked.mistakes:
        raise UserError(*checked.mistakes)
    task, device = tasks.build(checked.config.task), choose_device(LaunchConfig())
    task.recall(lineage)
    kind: Any = AutoModel if of_task else loading.auto_class(task.architecture)
    model: Any = adapter.load_model(kind, path, dtype="auto")
    model = model.to(device)
    mamba_mixer.install(model)
    half = next((name for name, dtype in precision.DTYPES.items() if dtype == model.dtype), "fp32")
    chosen = "fp32" if half == "fp16" and device == "cpu" else half
    if isinstance(task, EpisodesTask):
        means_CD = few_shot_merge.prototypes(path, len(lineage["labels"]))
        task.known, model = Known(lineage["labels"], means_CD.to(device)), features.Headless(model)
    reader = task.reader(ModelConfig(str(path), source="folder"))
    return Tuned(RunFolder(path), checked.config, model.eval(), task, reader, lineage, device, chosen)  # type: ignore[arg-type]
