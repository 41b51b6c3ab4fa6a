"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, all of it in `log.txt` too."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""


class Display:
    """Messages and progress of the main process; the others stay silent.

    Args:
        log: File that also gets every message.
        steps: Steps of the whole run.
        speaks: False in every process but the first.
        quiet: Nothing on the screen; the file still gets it all.
    """

    def __init__(self, log: Path, steps: int = 0, speaks: bool = True, quiet: bool = False):
        self.log, self.speaks = log, speaks
        self.console = Console(stderr=True, quiet=quiet or not speaks, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = 0.0
        self.steps = steps

    def say(self, message: str) -> None:
        """One message, on the screen and in the file."""
        if not self.speaks:
            return
        self.console.print(message, markup=False, soft_wrap=True)
        try:
            with self.log.open("a") as file:
                file.write(time.strftime("%H:%M:%S ") + message + "\n")
        except OSError as error:  # the message is on the screen; what the run needs to write will say it louder
            self.console.print(f"{self.log} cannot be written: {error.strerror}", markup=False, soft_wrap=True)

    def step(self, row: dict[str, Any]) -> None:
        """One optimiser step, as its row in metrics.jsonl says it."""
        if not self.speaks:
            return
        if self.console.is_terminal:
            self._on_terminal(row)
        elif time.monotonic() - self._last > PLAIN_SECONDS or row["step"] in (1, self.steps):
            self._last = time.monotonic()
            self.say(f"step {row['step']}/{self.steps}  {_figures(row)}")

    def _on_terminal(self, row: dict[str, Any]) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=self.steps, figures="")
            self._bar.start()
        self._bar.update(self._task, completed=row["step"], figures=_figures(row))

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(row: dict[str, Any]) -> str:
    unit = "tokens" if row["tokens"] else "rows"
    rate = row[unit] / max(row["seconds"], 1e-9)
    return f"loss {row['loss']:.4f}  {rate:,.0f} {unit}/s  {row['memory_bytes'] / 2**30:.2f} GiB"
