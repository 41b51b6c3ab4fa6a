"""`peft merge RUN --to DIR`: the tuned model as a plain folder or ONNX, which need neither this package nor PEFT."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.config.errors import UserError


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
    support: Annotated[
        Path | None,
        typer.Option(help="Of a few-shot run: examples of each class, whose task the folder is made for."),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the saved weights; same is that of training, with --support fp32.")
    ] = Dtype.same,
    force: Annotated[bool, typer.Option("--force", help="Use a base with other weights; it is recorded.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge in that folder.")] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write the merged model as ONNX instead; an adapter may stay unmerged in it.")
    ] = False,
    int8: Annotated[bool, typer.Option("--int8", help="With --onnx: also a file with 8-bit weights.")] = False,
    pt2: Annotated[bool, typer.Option("--pt2", help="With --onnx: also a program that PyTorch alone runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measured differences as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base, compare both on held-out rows, and write a plain model folder (or ONNX)."""
    for flag, given in (("--int8", int8), ("--pt2", pt2)):
        if given and not onnx:
            raise UserError(f"{flag} goes with --onnx")
    if onnx and dtype not in (Dtype.same, Dtype.fp32):
        raise UserError(f"--dtype {dtype.value}: an ONNX file is float32, and --int8 makes a smaller one beside it")
    from rich.console import Console

    if onnx:
        from peftcli.artifacts.onnx_folder import export_onnx

        with Console(stderr=True).status("exporting"):
            report = export_onnx(
                run, to, overrides or [], support=support, int8=int8, pt2=pt2, force=force, overwrite=overwrite
            )
        typer.echo(json.dumps(report)) if as_json else _print_onnx(report)
        return
    if support is not None:
        from peftcli.artifacts import few_shot_merge

        with Console(stderr=True).status("merging"):
            report = few_shot_merge.export(
                run, to, support, overrides or [], dtype=dtype.value, force=force, overwrite=overwrite
            )
        typer.echo(json.dumps(report)) if as_json else _print_task(report)
        return
    from peftcli.artifacts.export import export

    with Console(stderr=True).status("merging"):
        report = export(run, to, overrides or [], dtype=dtype.value, force=force, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)


def _compared(report: dict[str, Any], other: str) -> str:
    """What the numbers of the table are over."""
    rows, positions = report["rows"], report["positions"]
    if positions == rows:
        over = f"the scores of all {report['outputs']:,} classes"
    else:
        over = (
            f"the scores (logits) of all {report['outputs']:,} tokens at {positions:,} positions, the last of each row"
        )
    return (
        f"Compared with {other}: {over}, of {rows:,} {report['source']}. The differences are absolute; "
        "`worst position` is the mean at one position as a share of the scores' standard deviation, `same highest` the "
        "share of positions whose highest score is that of the same output."
    )


def _table(*columns: str) -> tuple[Any, Any]:
    """A console and an empty table for it; the first column names the row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    return console, table


def _print_onnx(report: dict[str, Any]) -> None:
    for note in report["notes"]:
        typer.echo(f"note: {note}")
    metric = [f"{report['metric']}, {report['measured_rows']} rows"] if report["measured_rows"] else []
    console, table = _table("MB", "mean difference", "worst position", "same highest", *metric, "median ms", "p95 ms")
    console.print(_compared(report, "the model in PyTorch"), highlight=False, soft_wrap=True)
    for name, about in report["files"].items():
        drift, speed, cells = about.get("drift"), about["latency"], [""] * 4
        if drift:
            cells = [f"{about['bytes'] / 1e6:.2f}", f"{drift['mean']:.3g}"]
            cells += [f"{drift['share']:.4%}", f"{drift['agreement']:.1%}"]
        cells += [f"{about['metrics'][report['metric']]:.4f}"] if metric else []
        table.add_row(name, *cells, f"{speed['median']:.2f}", f"{speed['p95']:.2f}")
    console.print(table)
    if report["merge"] is None:
        typer.echo("nothing was merged: the graph is that of the trained model, with what was put into it")
    if report["forced_base"]:
        typer.echo(f"forced: {len(report['forced_base'])} tensors of this base are not those that were trained on")
    typer.echo(f"milliseconds: one row at a time, threads: {report['threads']}")
    typer.echo(f"ONNX model, with lines of Python that run it in its README.md: {report['folder']}")


def _print_task(report: dict[str, Any]) -> None:
    for note in report["notes"]:
        typer.echo(f"note: {note}")
    if report["forced_base"]:
        typer.echo(f"forced: {len(report['forced_base'])} tensors of this base are not those that were trained on")
    drift, classes = report["reload"], report["classes"]
    typer.echo(
        f"read back, it gives all {report['rows']} rows of the support the class that the run gives them; the scores "
        f"differ by {drift['largest']:.3g} at most, where their spread is {drift['spread']:.3g}"
    )
    if report["probability"] is not None:
        typer.echo(f"probabilities differ by {report['probability']:.3g} at most: a linear head takes no cosines")
    else:
        typer.echo("its classes are the prototypes beside it; README.md has the lines of Python that ask it")
    typer.echo(f"model of {len(classes)} classes ({', '.join(classes)}) in {report['dtype']}: {report['folder']}")


def _print(report: dict[str, Any]) -> None:
    for note in report["notes"]:
        typer.echo(f"note: {note}")
    console, table = _table("mean difference", "largest", "worst position", "same highest")
    console.print(_compared(report, "the unmerged adapter"), highlight=False, soft_wrap=True)
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
