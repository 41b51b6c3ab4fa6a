"""What the model's forms cost, as the page's table shows it: the first one whole, the others as what they add to it.

Where the model itself was rebuilt there is nothing beside it: every form is shown whole, with its share of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftcli.reports import units


@dataclass(frozen=True)
class Table:
    """A table with a name in front of each row."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def table(costs: dict[str, Any]) -> Table | None:
    """The table of `report["costs"]`; None where nothing was measured."""
    if not costs.get("rows"):
        return None
    first = costs["rows"][0]
    sizes = list(first["latency"])
    columns = ["Parameters", "not zero", "File", "FLOPs of a row", f"Memory, batch of {sizes[-1]}"]
    columns += [f"Median ms, batch of {size}" for size in sizes]
    columns += [f"p95, batch of {size}" for size in sizes]
    return Table(
        _caption(costs, sizes),
        columns,
        [(row["form"], _cells(row, first, sizes, bool(costs.get("whole")))) for row in costs["rows"]],
    )


def _caption(costs: dict[str, Any], sizes: list[str]) -> str:
    first, threads = costs["rows"][0]["form"], costs["threads"]
    turns = ", ".join(f"{costs['rows'][0]['latency'][size]['turns']} with {size}" for size in sizes)
    left = "".join(f" A batch of {size} would have taken too long or too much memory." for size in costs["left_out"])
    if costs.get("whole"):
        what = f"The model in each form, and in brackets its share of the {first}. FLOPs: "
    else:
        what = f"The model in each form; below the {first}, what is added to it. File: what is saved beside the base. "
        what += "FLOPs: "
    return (
        f"{what}matrix products and convolutions. Memory: weights, and the most that tensors hold at once in a "
        f"forward pass. Times: {costs['precision']} on {costs['device']}, threads: {threads}, all forms in turn "
        f"({turns} rows), and in brackets the share of the {first}'s in the same turn. Zeros that are held save "
        f"nothing but space on disk.{left}"
    )


def _cells(row: dict[str, Any], first: dict[str, Any], sizes: list[str], whole: bool) -> list[str]:
    def beside(value: Callable[[dict[str, Any]], float], shown: Callable[[float], str]) -> str:
        if row is first:
            return shown(value(first))
        if whole:
            return f"{shown(value(row))} ({value(row) / (value(first) or 1):.3f})"
        more = value(row) - value(first)
        return f"{'+' if more >= 0 else '−'}{shown(abs(more))}"

    cells = [beside(lambda r: r["parameters"], units.count), beside(lambda r: r["nonzero"], units.count)]
    cells.append(beside(lambda r: r["file_bytes"], units.size) if whole else units.size(row["file_bytes"]))
    cells.append(beside(lambda r: r["flops"], _operations))
    cells.append(beside(lambda r: r["memory"]["weights"] + r["memory"]["beside"], units.size))
    for size in sizes:
        found = row["latency"][size]
        share = "" if row is first else f" ({found['ratio']:.3f})"
        cells.append(f"{found['median']:.2f}{share}")
    for size in sizes:
        p95 = row["latency"][size]["p95"]
        cells.append(units.NONE if p95 is None else f"{p95:.2f}")
    return cells


def _operations(count: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f}"
