"""`peft merge RUN --to DIR`: the tuned model as a plain folder that needs neither this package nor PEFT."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Types that merged weights are saved in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    to: Annotated[Path, typer.Option(help="The folder to make.")],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the saved weights; that of the run if not given.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge into a base with other weights; it is recorded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured differences as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base, compare both on held-out rows, and write a plain model folder."""
    from peftcli.training.export import export

    report = export(run, to, dtype.value if dtype else None, force)
    if as_json:
        typer.echo(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Outputs on {report['rows']} rows of the {report['split']} split, beside the unmerged adapter's"
    )
    for column in ("", "mean difference", "largest difference", "worst position, share of spread"):
        table.add_column(column, justify="left" if not column else "right")
    for name, key in (("merged", "merge"), ("read back", "reload")):
        drift = report[key]
        table.add_row(name, f"{drift['mean']:.3g}", f"{drift['largest']:.3g}", f"{drift['share']:.3%}")
    table.add_row("base, without the adapter", f"{report['merge']['effect']:.3g}", "", "")
    Console().print(table)
    if report["forced_base"]:
        typer.echo(f"forced: {len(report['forced_base'])} tensors of this base are not those that were trained on")
    typer.echo(f"model in {report['dtype']}: {report['folder']}")
