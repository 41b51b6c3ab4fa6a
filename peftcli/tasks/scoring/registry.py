"""Scorers by `task.scoring`; only the one that is asked for is imported."""

from __future__ import annotations

from importlib import import_module

from peftcli.config.errors import UserError, unknown
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring.contract import Scorer

SCORERS = {
    "text": "peftcli.tasks.scoring.text:TextScorer",
    "number": "peftcli.tasks.scoring.number:NumberScorer",
    "math": "peftcli.tasks.scoring.math:MathScorer",
    "code": "peftcli.tasks.scoring.code:CodeScorer",
    "sql": "peftcli.tasks.scoring.sql:SqlScorer",
}


def build(config: GenerationConfig) -> Scorer:
    """The scorer of a generation task.

    Raises:
        UserError: An unknown name, or settings that the scorer refuses.
    """
    if config.scoring not in SCORERS:
        raise UserError(unknown("scoring", config.scoring, SCORERS, where="task.scoring"))
    module, name = SCORERS[config.scoring].split(":")
    return getattr(import_module(module), name)(config)
