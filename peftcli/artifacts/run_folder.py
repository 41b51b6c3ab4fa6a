"""The folder of a run: the frozen config, the log, the numbers, the adapter: all it takes to repeat or continue it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from peftcli.artifacts import atomic
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, Mistake, UserError, nearest
from peftcli.config.schema import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the names in it. Make one with `create` or `open`."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig, overrides: Sequence[str] = (), among: Path | None = None) -> RunFolder:
        """Make `<output>/<date>_<time>_<recipe>` with the frozen config and the overrides in it.

        Paths in the config are made absolute, from the current folder.

        Args:
            config: The run.
            overrides: As typed.
            among: A folder of several runs in which this one gets the next number as its name, in place of the above.

        Raises:
            UserError: The output folder cannot be written to.
            CheckFailed: `disk-full` or `write-failed`; no folder is left behind.
        """
        run = cls(claim(config) if among is None else _numbered(among))
        try:
            with atomic.file(run.config) as partial:
                frozen.save(frozen.anchored(config), partial)
            atomic.write_text(run.overrides, "".join(f"{override}\n" for override in overrides))
        except BaseException:
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run folder at `path`.

        Raises:
            UserError: There is none; names the closest run folder and the latest ones.
        """
        run = cls(Path(path).expanduser())
        if run.config.is_file():
            return run
        around = run_folders(run.path) or run_folders(run.path.parent) or run_folders(Path("runs"))
        inside = next((str(p) for p in run.path.absolute().parents if (p / "config.yaml").is_file()), "")
        close = inside or _closest(run.path, around)
        what = f"{run.path} is not a run folder: " + (
            "it has no config.yaml" if run.path.is_dir() else "there is no such folder"
        )
        hint = "" if around or inside else "peft train RECIPE makes a run folder"
        raise UserError(Mistake(what, allowed=tuple(str(p) for p in around[:5]), nearest=close, hint=hint))

    @property
    def name(self) -> str:
        """The folder's own name, unique in its output folder."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """The resolved config; a worker process reads this and nothing else."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides from the command line, one a line."""
        return self.path / "overrides.txt"

    @property
    def environment(self) -> Path:
        """Versions, commit, hardware, seed."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a log step."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The run's results as data."""
        return self.path / "report.json"

    @property
    def page(self) -> Path:
        """The run's results for a person."""
        return self.path / "report.html"

    @property
    def adapter(self) -> Path:
        """The trained adapter, of methods that train one."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model, of methods that change the base itself."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where training can be continued from."""
        return self.path / "checkpoints"

    @property
    def log_file(self) -> Path:
        """What the run said."""
        return self.path / "log.txt"

    @property
    def status(self) -> str:
        """`done`, `stopped` or `failed` as the report says, or `unfinished` where there is no report yet."""
        return self.read_report()["run"]["status"] if self.report.is_file() else "unfinished"

    def use_processes(self, count: int) -> None:
        """Go on with so many processes; the batch of a step is the same with any number. One holds all of the model.

        Raises:
            UserError: The run cannot have so many.
        """
        config = frozen.load(self.config)
        launch = replace(config.launch, processes=count)
        if launch.world == 1:
            launch = replace(launch, strategy="ddp", offload=False)
        changed = replace(config, launch=launch)
        with atomic.file(self.config) as partial:
            frozen.save(changed, partial)
            frozen.load(partial)

    def become_latest(self) -> None:
        """Let `latest` beside the run point to it; where links are not to be had, there is none."""
        path = self.path.resolve()
        link, fresh = path.parent / "latest", path.parent / f".latest-{path.name}"
        try:
            if link.is_symlink() or not link.exists():
                fresh.symlink_to(path.name)
                os.replace(fresh, link)
        except OSError:
            fresh.unlink(missing_ok=True)

    @property
    def untrained(self) -> bool:
        """Nothing has been logged or saved yet: what is in the folder can be made again at once."""
        return not self.metrics() and not self.checkpoints.exists() and not self.report.exists()

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; on a full disk the file stays as it was.

        Raises:
            UserError: The folder cannot be written to.
            CheckFailed: `disk-full` or `write-failed`.
        """
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            with open(self.metrics_file, "ab", buffering=0) as stream:
                before = stream.tell()
                try:
                    if stream.write(line) != len(line):
                        raise OSError(28, "short write")
                except OSError:
                    stream.truncate(before)
                    raise
        except OSError as error:
            raise atomic.explain(error, self.metrics_file, f" ({len(line):,} bytes)") or error from error

    def cut(self, step: int) -> None:
        """Drop the rows past `step`, and a last line torn by a kill; the rows kept stay byte for byte."""
        lines = self._lines()
        kept = "".join(f"{line}\n" for line, row in lines if row["step"] <= step)
        if self.metrics_file.is_file() and self.metrics_file.read_text(encoding="utf-8", errors="replace") != kept:
            atomic.write_text(self.metrics_file, kept)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged so far; a last line that a kill tore is left out.

        Raises:
            CheckFailed: `damaged-file`, a line in the middle is not JSON.
        """
        return [row for _, row in self._lines()]

    def write_report(self, report: dict[str, Any]) -> None:
        """Write report.json whole. Raises as `atomic.file` does."""
        atomic.write_json(self.report, report)

    def read_report(self) -> dict[str, Any]:
        """The report.

        Raises:
            UserError: The run has none yet.
            CheckFailed: `damaged-file`, it is not JSON.
        """
        try:
            return _read(self.report)
        except FileNotFoundError:
            hint = f"continue it with: peft train --resume {self.path}"
            raise UserError(Mistake(f"{self.path} has no report yet: the run has not ended", hint=hint)) from None

    def read_environment(self) -> dict[str, Any]:
        """What environment.json says of the run's latest start; empty before the first.

        Raises:
            CheckFailed: `damaged-file`, it is not JSON.
        """
        return _read(self.environment) if self.environment.is_file() else {}

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Each whole line of metrics.jsonl and its row."""
        if not self.metrics_file.is_file():
            return []
        # A tear may run through a character, so the bytes are split before they are decoded.
        lines = [line for line in self.metrics_file.read_bytes().split(b"\n") if line]
        rows: list[tuple[str, dict[str, Any]]] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append((line.decode(), json.loads(line)))
            except ValueError as error:
                if number < len(lines):
                    raise CheckFailed("damaged-file", f"{self.metrics_file}:{number}: not JSON: {error}") from None
        return rows


def run_folders(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, the latest first."""
    if not folder.is_dir():
        return []
    found = [e for e in folder.iterdir() if (e / "config.yaml").is_file() and not e.is_symlink()]
    return sorted(found, key=lambda entry: (entry / "config.yaml").stat().st_mtime, reverse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckFailed("damaged-file", f"{path} is not JSON: {error}") from None


def stem(config: RunConfig) -> str:
    """What a run folder made now is called, unless there is one of that name."""
    name = re.sub(r"[\x00-\x1f/]", "-", (config.name or "run").strip("/"))
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{name}"


def _numbered(among: Path) -> Path:
    for number in count():
        try:
            (path := among / f"{number:04}").mkdir()
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise atomic.explain(error, path) or error from error
    raise AssertionError("unreachable")


def claim(config: RunConfig, ending: str = "") -> Path:
    """Make a folder that no other run has, also when several start in the same second.

    Raises:
        UserError: The output folder cannot be written to.
    """
    output, stem_now = Path(config.output).expanduser(), stem(config) + ending
    for number in count(1):
        path = output / (stem_now if number == 1 else f"{stem_now}-{number}")
        try:
            output.mkdir(parents=True, exist_ok=True)
            os.mkdir(path)
            return path
        except FileExistsError as error:
            if not output.is_dir():
                raise atomic.explain(error, path) or error from error
        except OSError as error:
            raise atomic.explain(error, path) or error from error
    raise AssertionError("unreachable")


def _closest(path: Path, folders: list[Path]) -> str:
    by_name = {folder.name: str(folder) for folder in folders}
    return by_name.get(nearest(path.name, by_name), "")
