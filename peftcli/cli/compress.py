"""`peft compress RUN|RECIPE target.parameters=50%`: a smaller model from the row and column spaces that one uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli.completion import complete_override
from peftcli.config import permission

if TYPE_CHECKING:
    from peftcli.config.compose import Composed

SHORT = "target."
"""Of `method.target.`, on this command."""


def compress(
    original: Annotated[
        str, typer.Argument(help="A finished run's folder, whose model is made smaller, or a recipe, whose base is.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="target.parameters=50% (or flops, latency), and values in Hydra's grammar: key=value.",
            autocompletion=complete_override,
        ),
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help=permission.HELP)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the closing tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Rebuild a model smaller from the spaces that it uses on its rows, fine-tune it, and leave a run folder."""
    from peftcli.cli.train import close, start

    given = [f"method.{one}" if one.startswith(SHORT) else one for one in overrides or []]
    with permission.code(allow_code):
        ended = start(_composed(original, given), quiet, as_json)
    if ended is None:
        return
    folder, report = ended
    close(folder, report, as_json)
    if not as_json and report["run"]["status"] == "done":
        _print(report, folder)


def _composed(original: str, given: list[str]) -> Composed:
    from peftcli.config.compose import compose

    chosen = ["method=rowcol", "method.mode=compress"]
    if not Path(original).expanduser().is_dir():
        return compose(original, [*chosen, *given])
    from rich.console import Console

    from peftcli.artifacts import original as finished
    from peftcli.artifacts.tuned import find

    run = find(Path(original))
    compose(str(run.config), [*chosen, *given])  # a mistake is told before a large model is merged
    with Console(stderr=True).status("merging"):
        changes = finished.overrides(run.path)
    # That the run's own method is not taken over goes without saying.
    return replace(compose(str(run.config), [*chosen, *changes, *given]), notes=[])


def _print(report: dict[str, Any], folder: Path) -> None:
    from peftcli.cli.tables import titled, whole_lines
    from peftcli.reports import costs

    for note in report["data"]["notes"]:
        typer.echo(f"note: {note}")
    if forms := costs.table(report.get("costs") or {}):
        console = whole_lines()
        table = titled(console, "Costs", "", *forms.columns)
        for name, cells in forms.rows:
            table.add_row(name, *cells)
        console.print(table)
    typer.echo(f"model: {folder / 'model'}")
