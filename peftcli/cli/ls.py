"""`peft ls`: what there is to choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftcli.config import catalog
from peftcli.config.checks import CHECKS
from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.paths import shipped

KINDS = ("recipes", "models", "methods", "data", "checks", "runs")


def _complete(typed: str) -> list[str]:
    return [kind for kind in KINDS if kind.startswith(typed)]


def ls(
    kind: Annotated[
        str, typer.Argument(help=f"What to list: {', '.join(KINDS)}.", autocompletion=_complete)
    ] = "recipes",
    folder: Annotated[
        Path | None, typer.Argument(help="Where the runs are, for `peft ls runs`.", show_default="./runs")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes, models, methods, data, checks, or the runs in a folder."""
    if kind not in KINDS:
        raise UserError(unknown("kind of thing to list", kind, KINDS))
    if folder is not None and kind != "runs":
        raise UserError(Mistake(f"peft ls {kind} takes no folder ({folder})", hint=f"peft ls runs {folder}"))
    rows = _rows(kind, folder or Path("runs"))
    if kind == "runs" and not rows:
        typer.echo(f"no runs in {folder or './runs'}", err=True)
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": about} for name, about in rows.items()], indent=2))
        return
    from rich.table import Table

    from peftcli.cli.tables import whole_lines

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, about in rows.items():
        table.add_row(name, about)
    whole_lines().print(table)


def _rows(kind: str, folder: Path) -> dict[str, str]:
    match kind:
        case "recipes":
            return {name: _first_comment(path.read_text(encoding="utf-8")) for name, path in catalog.recipes().items()}
        case "models":
            return _group("model")
        case "data":
            return _group("data")
        case "methods":
            return {name: _about_method(name) for name in sorted(catalog.methods())}
        case "runs":
            return _runs(folder)
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
        status = (run.report.get("run") or {}).get("status", "unfinished")
        parts = [str(run.config.get("name") or ""), "running" if status != "done" and _is_held(path) else status]
        if metric in tuned:
            parts.append(f"{metric} {quality.written(metric, tuned[metric])} on {told['split']}")
        parts.append(units.size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file())))
        found[str(path)] = ", ".join(part for part in parts if part)
    return found


def _is_held(run: Path) -> bool:
    """Whether a process trains in this run folder: it holds the folder's lock."""
    from filelock import FileLock, Timeout

    place = run / ".lock"
    if not place.is_file():
        return False
    try:
        with FileLock(place).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's folder, of which no more can be said
        return False


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
