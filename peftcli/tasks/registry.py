"""Tasks by `task.type`; only the one that is asked for is imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from peftcli.config.errors import UserError, unknown
from peftcli.tasks.contract import Task

TASKS = {
    "classification": "peftcli.tasks.classification:ClassificationTask",
    "generation": "peftcli.tasks.generation:GenerationTask",
    "episodes": "peftcli.tasks.episodes.task:EpisodesTask",
    "images": "peftcli.tasks.images.task:ImagesTask",
}


def build(config: Any, seed: int = 0) -> Task:
    """The task of a recipe's `task` group, with the run's seed for answers that are drawn.

    Raises:
        UserError: An unknown type, template, metric or regular expression.
    """
    if config.type not in TASKS:
        raise UserError(unknown("task", config.type, TASKS, where="task.type"))
    module, name = TASKS[config.type].split(":")
    return getattr(import_module(module), name)(config, seed)
