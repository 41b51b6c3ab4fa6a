"""`peft merge RUN --to DIR`: the tuned model as a plain folder that needs neither this package nor PEFT."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Types that merged weights are saved in."""

    same = "same"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def merge(
    run: Annotated[Path, typer.Argument(help="The run's folder, or the adapter's folder in it.")],
    to: Annotated[Path, typer.Option(help="The folder to make.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Where things are now: model.name=FOLDER, data.files.test=FILE."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the saved weights; same is that of training.")] = Dtype.same,
    force: Annotated[bool, typer.Option("--force", help="Use a base with other weights; it is recorded.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge in that folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured differences as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base, compare both on held-out rows, and write a plain model folder."""
    from rich.console import Console

    from peftcli.artifacts.export import export

    with Console(stderr=True).status("merging"):
        report = export(run, to, overrides or [], dtype=dtype.value, force=force, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)


def _compared(report: dict[str, Any]) -> str:
    """What the numbers of the table are over."""
    rows, positions = report["rows"], report["positions"]
    if positions == rows:
        over = f"the scores of all {report['outputs']:,} classes"
    else:
        over = (
            f"the scores (logits) of all {report['outputs']:,} tokens at {positions:,} positions, the last of each row"
        )
    return (
        f"Compared with the unmerged adapter: {over}, of {rows:,} {report['source']}. The differences are absolute; "
        "`worst position` is the mean at one position as a share of the scores' standard deviation, `same highest` the "
        "share of positions whose highest score is that of the same output."
    )


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    for note in report["notes"]:
        typer.echo(f"note: {note}")
    console = Console()
    console.print(_compared(report), highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in ("", "mean difference", "largest", "worst position", "same highest"):
        table.add_column(column, justify="right" if column else "left")
    for name, key in (("merged", "merge"), ("read back", "reload")):
        drift = report[key]
        worst = f"{drift['share']:.3%} of spread"
        table.add_row(name, f"{drift['mean']:.3g}", f"{drift['largest']:.3g}", worst, f"{drift['agreement']:.1%}")
    table.add_row("untouched base", f"{report['merge']['effect']:.3g}")
    console.print(table)
    if report["forced_base"]:
        typer.echo(f"forced: {len(report['forced_base'])} tensors of this base are not those that were trained on")
    if bits := report.get("quantization"):
        typer.echo(f"the base was in {bits}; its matrices were made whole in float32, merged, and saved whole")
    typer.echo(f"model in {report['dtype']}: {report['folder']}")
