"""A finished run's model as the base of another run: its adapter merged, its rows and task as they were."""

from __future__ import annotations

from pathlib import Path

from peftcli.artifacts import adapter
from peftcli.artifacts.export import export
from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import find
from peftcli.config import frozen
from peftcli.config.errors import Mistake, UserError
from peftcli.methods import registry as methods

MERGED = "merged"
"""Folder in the run folder for its merged model, made once."""
RATE = 2e-4
"""Learning rate of all weights, where the run's was one of an adapter."""


def overrides(path: Path) -> list[str]:
    """What makes a run's config that of a run on its model, as overrides.

    Args:
        path: The run's folder, or its adapter's or model's.

    Raises:
        UserError: No finished run there, or its adapter cannot be merged.
        CheckFailed: As `peftcli.artifacts.export.export`.
    """
    run = find(path)
    if run.status != "done":
        what = f"{run.path} is {run.status}, so there is no model to go on from"
        raise UserError(Mistake(what, hint=f"continue it to its end: peft train --resume {run.path}"))
    config = frozen.load(run.config)
    whole = methods.find(config.method.name)(config.method).saves == "model"
    changes = [f"name={config.name}_compress", "model.weights=pretrained", "model.source=folder"]
    changes += [f"model.name='{_model(run, whole).resolve()}'", "model.revision=null", "model.dtype=float32"]
    changes += ["~model.shape"] if config.model.shape else []
    changes += ["model.quantization=null"] if config.model.quantization else []
    return [*changes, *([] if whole else [f"optim.lr={RATE}"])]


def _model(run: RunFolder, whole: bool) -> Path:
    if whole:
        return run.model
    folder = run.path / MERGED
    if not (folder / adapter.LINEAGE).is_file():
        export(run.path, folder, dtype="fp32")
    return folder
