"""What a run folder holds, read with patience: a stopped or failed run has only part of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Record:
    """The contents of a run folder.

    Attributes:
        path: The folder.
        config_text: config.yaml as it stands.
        config: The same, parsed; empty where it cannot be.
        overrides: What was changed on the command line, one `key=value` each.
        steps: The log lines of training steps, in order.
        validations: The log lines of measurements, in order.
        report: report.json.
        environment: environment.json.
        adapter_config: The adapter's own configuration; empty where there is no adapter.
        notes: What could not be read.
    """

    path: Path
    config_text: str
    config: dict[str, Any]
    overrides: list[str]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    report: dict[str, Any]
    environment: dict[str, Any]
    adapter_config: dict[str, Any]
    notes: list[str]


def read(run: Path) -> Record:
    """Read a run folder; a missing file is empty, an unreadable one is empty and noted."""
    notes: list[str] = []
    config_text = _text(run / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
        notes.append("config.yaml is not readable YAML")
    lines = _lines(run / "metrics.jsonl", notes)
    return Record(
        path=run,
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        overrides=[line.strip() for line in _text(run / "overrides.txt").splitlines() if line.strip()],
        steps=[line for line in lines if "validation" not in line],
        validations=[line for line in lines if isinstance(line.get("validation"), dict)],
        report=_mapping(run / "report.json", notes),
        environment=_mapping(run / "environment.json", notes),
        adapter_config=_mapping(run / "adapter" / "adapter_config.json", notes),
        notes=notes,
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    try:
        content = json.loads(text or "{}")
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} is not readable JSON")
        return {}
    return content


def _lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows, unreadable = [], 0
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif line.strip():
            unreadable += 1
    if unreadable:
        notes.append(f"{path.name}: {unreadable} unreadable line{'s' * (unreadable > 1)} left out")
    return rows
