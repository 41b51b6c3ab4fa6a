"""`peft ls`: what there is to choose from."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from peftcli.config import catalog
from peftcli.config.checks import CHECKS
from peftcli.config.errors import UserError
from peftcli.config.paths import shipped


class Kind(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    models = "models"
    methods = "methods"
    data = "data"
    checks = "checks"
    runs = "runs"


def ls(
    kind: Annotated[Kind, typer.Argument(help="What to list.")] = Kind.recipes,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes, models, methods, data, checks, and the runs in ./runs."""
    rows = _rows(kind)
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": about} for name, about in rows.items()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, about in rows.items():
        table.add_row(name, about)
    whole_lines = None if sys.stdout.isatty() else 1000  # for grep
    Console(markup=False, width=whole_lines).print(table)


def _rows(kind: Kind) -> dict[str, str]:
    match kind:
        case Kind.recipes:
            return {name: _first_comment(path.read_text(encoding="utf-8")) for name, path in catalog.recipes().items()}
        case Kind.models:
            return _group("model")
        case Kind.data:
            return _group("data")
        case Kind.methods:
            return {name: _about_method(name) for name in sorted(catalog.methods())}
        case Kind.runs:
            return _runs(Path("runs"))
    return CHECKS


def _runs(folder: Path) -> dict[str, str]:
    """The run folders in a folder, the latest first: how each ended, its quality, its size on the disk."""
    from peftcli.artifacts.run_folder import run_folders
    from peftcli.reports import quality, record, units

    found = {}
    for path in run_folders(folder):
        run = record.read(path)
        told = run.report.get("quality") or {}
        metric = str(told.get("metric"))
        tuned: dict = next((row["metrics"] for row in told.get("rows", []) if row["name"] == "tuned"), {})
        parts = [str(run.config.get("name") or ""), (run.report.get("run") or {}).get("status", "unfinished")]
        if metric in tuned:
            parts.append(f"{metric} {quality.written(metric, tuned[metric])} on {told['split']}")
        parts.append(units.size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
        found[str(path)] = ", ".join(part for part in parts if part)
    return found


def _group(group: str) -> dict[str, str]:
    files = {name: shipped("configs") / group / f"{name}.yaml" for name in catalog.groups().get(group, [])}
    return {name: _first_comment(file.read_text(encoding="utf-8")) for name, file in files.items()}


def _about_method(name: str) -> str:
    try:
        return " ".join((catalog.settings_class(name).__doc__ or "").split())
    except UserError as error:
        return str(error)


def _first_comment(text: str) -> str:
    """The comment at the top of a file: one source for what it is."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
