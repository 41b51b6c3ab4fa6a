"""Many runs as one job array: a folder of run folders, and a table of them that says what each is and how it stands."""

from __future__ import annotations

import csv
import io
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from peftcli.artifacts import atomic, run_folder
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import RunConfig, SlurmConfig
from peftcli.launch.processes import FAILURE

if TYPE_CHECKING:
    from peftcli.config.compose import Composed

ENDING = "_array"
TABLE = "members.csv"
"""`id,status,overrides` (of these the ones that not all share): made anew from the run folders whenever one ends and
whenever someone looks."""


@dataclass(frozen=True)
class Member:
    """A line of the table."""

    number: int
    folder: Path
    status: str
    overrides: str


def is_array(folder: Path) -> bool:
    return (folder / TABLE).is_file()


def compose_members(composed: Composed) -> list[Composed]:
    """Every line of the file `launch.array` as a recipe of its own: all mistakes of all lines at once.

    Raises:
        UserError: A line is a mistake, comes twice, or asks for another kind of job; there is none.
    """
    from peftcli.config.compose import compose

    launch = composed.config.launch
    assert isinstance(launch, SlurmConfig)
    assert launch.array is not None
    file = Path(launch.array).expanduser()
    found: list[Composed] = []
    mistakes: list[Mistake] = []
    seen: dict[tuple[str, ...], int] = {}
    for number, given in _lines(file):
        where = f"{file}:{number}"
        if tuple(given) in seen:
            mistakes.append(Mistake(f"the same overrides as in line {seen[tuple(given)]}", where))
        seen.setdefault(tuple(given), number)
        try:
            member = compose(str(composed.recipe_path), [*composed.overrides, *given])
        except UserError as error:
            mistakes += [replace(m, where=f"{where}: {m.where}" if m.where else where) for m in error.mistakes]
            continue
        if member.config.launch != launch:
            hint = "give launch.* on the command line: it is the same for all members"
            mistakes.append(Mistake("the members of one array share its launch group", where, hint=hint))
        found.append(member)
    if mistakes:
        raise UserError(*mistakes)
    if not found:
        raise UserError(
            Mistake(f"{file} has no overrides", hint="write a line for each run, such as: seed=1 optim.lr=1e-3")
        )
    return found


def _lines(file: Path) -> list[tuple[int, list[str]]]:
    """Number and overrides of each line, without blank ones and comments."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"launch.array={file} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if words := shlex.split(line, comments=True):
                found.append((number, words))
        except ValueError as error:
            raise UserError(Mistake(f"cannot be taken apart: {str(error).lower()}", f"{file}:{number}")) from None
    return found


def create(runs: Sequence[tuple[RunConfig, Sequence[str]]]) -> Path:
    """Make the folder of an array with a run folder for each member.

    Raises:
        UserError: The output folder cannot be written to.
        CheckFailed: `disk-full` or `write-failed`; nothing is left behind.
    """
    folder = run_folder.claim(runs[0][0], ENDING)
    try:
        for config, overrides in runs:
            RunFolder.create(config, overrides, among=folder)
        _write(folder, members(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def refresh(folder: Path) -> list[Member]:
    """The members as their folders are now, and the table written anew, where this process may and nobody is at it."""
    found = members(folder)
    with suppress(OSError, Timeout, UserError, CheckFailed), FileLock(folder / ".lock").acquire(timeout=10):
        _write(folder, found)
    return found


def _write(folder: Path, found: Sequence[Member]) -> None:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "status", "overrides"])
    rows.writerows([f"{m.number:04}", m.status, m.overrides] for m in found)
    atomic.write_text(folder / TABLE, text.getvalue())


def members(folder: Path) -> list[Member]:
    """The members as their folders are now."""
    runs = [RunFolder(p) for p in sorted(folder.iterdir()) if p.name.isdigit() and (p / "config.yaml").is_file()]
    given = [run.overrides.read_text().splitlines() if run.overrides.is_file() else [] for run in runs]
    common = set[str]().union(*given).intersection(*given) if len(runs) > 1 else set()
    return [
        Member(int(run.name), run.path, status(run), shlex.join(line for line in lines if line not in common))
        for run, lines in zip(runs, given, strict=True)
    ]


def status(run: RunFolder) -> str:
    """`done`, `failed`, `stopped`, `started`, or `new` where nothing has been written yet."""
    try:
        said = run.status
    except (CheckFailed, KeyError):
        return "damaged"
    if said != "done" and (run.path / FAILURE).exists():
        return "failed"
    if said == "unfinished":
        return "started" if run.environment.is_file() else "new"
    return said


def numbers(written: str) -> list[int]:
    """The numbers of `0-3,7`."""
    ends = [[int(end) for end in part.split("-")] for part in written.split(",")]
    return [number for first, *rest in ends for number in range(first, (rest or [first])[0] + 1)]


def launch_of(folder: Path) -> SlurmConfig:
    """What the members share."""
    from peftcli.config import frozen

    launch = frozen.load(folder / "0000" / "config.yaml").launch
    assert isinstance(launch, SlurmConfig)
    return launch
