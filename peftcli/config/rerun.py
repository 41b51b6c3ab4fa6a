"""The config of a finished run, with the few changes that using the run allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcli.config.compose import compose
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig

GROUPS = ("data", "model", "launch")
"""Groups that say where things are now."""
MEASURED = (
    "prompt", "completion", "max_length", "generated_rows", "max_new_tokens", "beams", "samples", "temperature",
    "top_p", "scoring", "answer", "program", "tests", "databases", "best_metric", "false_alarms",
    "validation_episodes", "test_episodes",
)  # fmt: skip
TRAINING = ("eval_batch_size", "precision", "merge_tolerance")
KEYS = (*(f"training.{name}" for name in TRAINING), *(f"task.{name}" for name in MEASURED))
"""Keys that change how a finished model is measured, not what it is."""


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's config.yaml, changed by overrides in Hydra's grammar.

    Args:
        path: The run's config.yaml.
        overrides: Where rows, base model and hardware are now, or how much is measured at once; nothing that would
            make it another run.

    Raises:
        UserError: With every mistake.
    """
    keys = {override: override.lstrip("+~").partition("=")[0] for override in overrides}
    strange = [override for override, key in keys.items() if key.split(".")[0] not in GROUPS and key not in KEYS]
    if strange:
        allowed = (*(f"{group}.*" for group in GROUPS), *KEYS)
        what = "would make it another run; a finished run is used as it was trained"
        raise UserError(*(Mistake(what, f"override {override}", allowed) for override in strange))
    return compose(str(path), overrides).config
