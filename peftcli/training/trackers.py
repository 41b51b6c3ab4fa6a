"""Metrics to a tracker through Accelerate, beside the run folder that always has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig

Track = Callable[[dict[str, Any]], None]


def start(accelerator: Accelerator, config: RunConfig, run: RunFolder) -> Track:
    """A function that takes rows of metrics.jsonl; it does nothing without a tracker.

    Raises:
        UserError: The tracker's package is not installed.
    """
    name = config.tracker.name
    if name == "none":
        return lambda row: None
    if not accelerator.trackers and name not in [str(t) for t in accelerator.log_with]:
        raise UserError(Mistake(f"tracker {name!r} is not installed", hint=f"pip install 'peftcli[{_extra(name)}]'"))
    settings = {"wandb": {"name": run.name}, "mlflow": {"run_name": run.name}}
    accelerator.init_trackers(
        config.tracker.project, config=_flat(asdict(config)), init_kwargs={name: settings.get(name, {})}
    )
    return lambda row: accelerator.log(_numbers(row), step=row["step"])


def _extra(name: str) -> str:
    return "registry" if name == "trackio" else name


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    measured = {f"validation/{k}": v for k, v in row.get("validation", {}).items()}
    return {**{f"train/{k}": v for k, v in row.items() if isinstance(v, int | float)}, **measured}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
