"""`peft estimate RECIPE`: parameters and memory from shapes; with --probe three real steps, hours and money."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli.arguments import AsJson, Overrides, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from peftcli.config.schema import RunConfig
    from peftcli.training.estimate import Estimate
    from peftcli.training.probe import Measured
    from peftcli.training.workload import Shape

WIDTH = 120
"""Columns of the output where it goes to a file or a pipe."""
PARTS = {
    "weights": "weights, as loaded",
    "adapter": "what the method adds",
    "gradients": "gradients",
    "optimiser": "optimiser",
    "activations": "activations",
    "temporaries": "temporaries",
    "holes": "allocator's holes",
}


def estimate(
    recipe: Recipe,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also train three real steps and measure them.")] = False,
    price: Annotated[float | None, typer.Option(help="Price of this machine an hour; needs --probe.")] = None,
    as_json: AsJson = False,
) -> None:
    """Count parameters and memory of a recipe without loading weights."""
    from peftcli.config.compose import compose
    from peftcli.config.errors import UserError

    if price is not None and (not probe or price < 0):
        raise UserError("--price is at least 0 and multiplies the hours that --probe finds: --probe --price 2.5")
    composed = compose(recipe, overrides or [])
    for note in composed.notes:
        typer.echo(f"note: {note}", err=True)
    from peftcli.training import estimate as counting
    from peftcli.training import workload

    work = workload.find(composed.config)
    found = counting.count(composed.config, work)
    savings = [] if found.fits is not False else _savings(composed.config, found)
    measured = None
    if probe:
        from peftcli.training.probe import probe as run

        measured = run(composed.config)
    if as_json:
        typer.echo(json.dumps(_plain(found, savings, measured, price), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    _print(console, found, savings)
    if measured:
        _print_measured(console, found, measured, price)


def _savings(config: RunConfig, found: Estimate) -> list[tuple[str, int]]:
    """The cheapest changes that lower the peak, and the peak that each alone would come to."""
    from peftcli.training import estimate as counting
    from peftcli.training.out_of_memory import MOST, candidates, smaller_adapter

    held = found.heaviest[1]
    adapter = held.adapter + held.gradients + held.optimiser
    changes = list(candidates(config))
    if adapter > max(held.weights, held.activations + held.temporaries + held.holes - held.apart):
        over = (found.peak - (found.free or 0)) / (found.processes * adapter)
        changes = smaller_adapter(config, 1 - over) + changes
    savings: list[tuple[str, int]] = []
    for change in changes:
        if len(savings) == MOST:
            break
        # What the program holds is looked up anew by each estimate, and no change makes it less.
        peak = replace(counting.estimate(change.config), program=found.program).peak
        if peak < found.peak:
            savings.append((str(change), peak))
    return savings


def _plain(found: Estimate, savings: list[tuple[str, int]], measured: Measured | None, price: float | None) -> Any:
    plain = found.plain() | {"changes": [{"change": change, "peak": peak} for change, peak in savings]}
    if measured:
        plain["probe"] = {**vars(measured), "growth": measured.growth, "hours": measured.hours}
        if price is not None:
            plain["probe"]["price"] = price * measured.hours
    return plain


def _table(console: Console, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ROUNDED if console.is_terminal else None, pad_edge=console.is_terminal)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _print(console: Console, found: Estimate, savings: list[tuple[str, int]]) -> None:
    from peftcli.reports.units import percent, size

    table = _table(console, "parameters", "all", "trained")
    for row in found.parameters["by_role"]:
        table.add_row(row["role"], f"{row['total']:,}", f"{row['trainable']:,}" if row["trainable"] else "")
    total, trained = found.parameters["total"], found.parameters["trainable"]
    table.add_row("all roles", f"{total:,}", f"{trained:,} ({percent(trained / total, 2)})", style="bold")
    console.print(table)
    console.print()
    console.print(_memory(console, found))
    dtypes = ", ".join(f"{dtype} {size(held)}" for dtype, held in found.weights_by_dtype.items())
    console.print(f"\nweights by type: {dtypes}; saved at the end: {size(found.file_bytes)}")
    if found.measuring is not None:
        console.print(f"while measuring: {size(found.measuring)} over the loaded base")
    for note in found.notes:
        console.print(f"note: {note}", style="yellow")
    _print_fit(console, found, savings)


def _memory(console: Console, found: Estimate) -> Any:
    from peftcli.reports.units import size

    pictures, of_tasks = found.unit == "pixels", bool(found.heaviest[0].parts)
    names = ("largest tasks", "usual tasks") if of_tasks else ("longest rows", "mean rows")
    columns = [(name, pair) for name, pair in zip(names, (found.heaviest, found.mean), strict=True) if pair]
    if pictures and not of_tasks:
        columns = [("pictures", found.heaviest)]  # all of them are of one size
    table = _table(console, f"memory, {found.precision} on {found.device}", *(name for name, _ in columns))
    title = "pictures x pixels a side" if pictures else "rows x tokens, learnt"
    table.add_row(title, *(_shape(shape, pictures) for _, (shape, _) in columns))
    for part, title in PARTS.items():
        table.add_row(title, *(size(getattr(held, part)) for _, (_, held) in columns))
    if any(held.apart for _, (_, held) in columns):
        table.add_row("less what is never held at once", *(size(held.apart) for _, (_, held) in columns))
    table.add_row("all of it", *(size(held.peak) for _, (_, held) in columns), style="bold")
    return table


def _shape(shape: Shape, pictures: bool) -> str:
    return f"{shape.rows} x {shape.length}" + ("" if pictures else f", {shape.learnt:,}")


def _print_fit(console: Console, found: Estimate, savings: list[tuple[str, int]]) -> None:
    from peftcli.reports.units import size

    where = "GPU memory" if found.device == "cuda" else "memory"
    parts = [f"{size(found.program)} for Python and its libraries"] if found.program else []
    parts += [f"{found.processes} processes"] if found.processes > 1 else []
    needed = f"needs {size(found.peak)}" + (f" on each of {found.devices} GPUs" if found.devices > 1 else "")
    needed += f" ({', '.join(parts)} included)" if parts else ""
    if found.loading and found.devices > 1:
        console.print(f"while it loads: {size(found.loading)} of the CPU's memory for each GPU, before it is cut up")
    if found.fits is None:
        console.print(f"{needed}; this machine has no such device to compare with")
        return
    verdict = "fits" if found.fits else "does not fit"
    style = "green" if found.fits else "red"
    console.print(f"{needed}: {verdict} into the {size(found.free)} of {where} that are free here", style=style)
    for change, peak in savings:
        console.print(f"  {change}: {size(peak)}{', fits' if peak <= (found.free or 0) else ''}")


def _print_measured(console: Console, found: Estimate, measured: Measured, price: float | None) -> None:
    from peftcli.reports.units import duration, size

    console.print()
    table = _table(console, "three real steps", "predicted", "measured")
    table.add_row("growth over the loaded base", size(found.heaviest[1].growth), size(measured.growth))
    table.add_row("peak", size(found.program + found.heaviest[1].peak), size(measured.peak_bytes))
    console.print(table)
    whole = f"{duration(measured.hours * 3600)} ({measured.hours:.3g} hours)"
    console.print(f"{measured.steps:,} steps of {duration(measured.step_seconds)}: {whole}, measurements not counted")
    if price is not None:
        console.print(f"at {price:g} an hour: {price * measured.hours:,.2f}")
