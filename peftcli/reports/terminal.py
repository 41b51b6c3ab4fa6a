"""The closing table of `peft train`: what was gained, and what it cost."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from peftcli.reports import quality, units

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def table(report: dict[str, Any]) -> Table:
    """The quality of the base, the baselines and the tuned model, with the cost as its caption.

    Args:
        report: The contents of report.json; missing parts are left out.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    measured = quality.table(report)
    main = measured.metrics[0] if measured.metrics else ""
    rows = measured.counts.get(main)
    split = (report.get("quality") or {}).get("split", "test")
    view = Table(box=box.SIMPLE_HEAD, caption=Text(_below(report)), caption_justify="left", pad_edge=False)
    view.add_column(Text(f"{split} split, {rows:,} {quality.unit_of(report)}" if rows else f"{split} split"))
    if _crowded(measured):
        _by_metric(view, measured)
    else:
        _by_model(view, measured)
    return view


def _crowded(measured: quality.Table) -> bool:
    """Whether other metrics than the first have intervals."""
    return any(cell.interval for _, cells in measured.rows for cell in cells[1:])


def _by_model(view: Table, measured: quality.Table) -> None:
    """A row a model, with the interval of the first metric."""
    from rich.text import Text

    bounded = any(cells[0].interval for _, cells in measured.rows if cells)
    for index, metric in enumerate(measured.metrics):
        view.add_column(Text(quality.title(metric)), justify="right")
        if index == 0 and bounded:
            view.add_column("95 % interval", justify="right", style="dim")
    for name, cells in measured.rows:
        texts = []
        for index, cell in enumerate(cells):
            texts.append(_value(cell))
            if index == 0 and bounded:
                texts.append(Text(cell.range.replace(" %", "")))
        view.add_row(Text(name), *texts, style="bold" if name == "tuned" else "")


def _by_metric(view: Table, measured: quality.Table) -> None:
    """A row a metric, with an interval for each model: so many columns would not fit otherwise."""
    from rich.text import Text

    for name, _ in measured.rows:
        view.add_column(Text(name), justify="right", style="bold" if name == "tuned" else "")
        view.add_column("95 % interval", justify="right", style="dim", no_wrap=True)
    for index, metric in enumerate(measured.metrics):
        cells = [cells[index] for _, cells in measured.rows]
        texts = [text for cell in cells for text in (_value(cell), Text(cell.range))]
        view.add_row(Text(quality.title(metric)), *texts)


def _value(cell: quality.Cell) -> Text:
    from rich.text import Text

    return Text(cell.text + (" *" if cell.best else "  "), style="green" if cell.best else "")


def _below(report: dict[str, Any]) -> str:
    """What stands below the table: cost, the meaning of the star where there is one, and the verdict."""
    measured = quality.table(report)
    starred = any(cell.best for _, cells in measured.rows for cell in cells)
    best = f"* best of its {'row' if _crowded(measured) else 'column'}"
    lines = [cost(report), best if starred else "", quality.protocol(report)]
    lines.append(quality.verdict(report) if measured.rows else "")
    return "\n".join(line for line in lines if line)


def show(report: dict[str, Any]) -> None:
    """Print the table: in colour on a terminal, else as plain text, however wide."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(table(report))
    else:
        print(plain(report), end="")


def cost(report: dict[str, Any]) -> str:
    """One line: trained parameters, peak memory, time."""
    parameters, memory, time = (report.get(key) or {} for key in ("parameters", "memory", "time"))
    parts = []
    if (trained := parameters.get("trainable")) is not None:
        total = parameters.get("total")
        share = f" of {total:,} ({units.percent(trained / total, 2)})" if total else ""
        parts.append(f"trained {trained:,}{share}")
    if memory.get("peak_bytes"):
        parts.append(f"peak memory {units.size(memory['peak_bytes'])}")
    if time.get("total_seconds"):
        parts.append(f"time {units.duration(time['total_seconds'])}")
    return "  ".join(parts)


def plain(report: dict[str, Any]) -> str:
    """The same table as aligned text without colour, rules or wrapping, for logs and pipes."""
    from rich.console import Console

    view = table(report)
    view.box = None
    view.caption = None
    text = io.StringIO()
    Console(file=text, width=200, color_system=None, force_terminal=False, legacy_windows=False).print(view)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([*lines, _below(report)]).rstrip() + "\n"
