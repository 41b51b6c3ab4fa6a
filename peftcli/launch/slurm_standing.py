"""How this user's runs on a cluster stand: from the queue, the accounts where there are any, and the run folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.launch import slurm, slurm_array, slurm_queue
from peftcli.launch.slurm_queue import Job

TAIL = 64 * 1024
"""Bytes at the end of metrics.jsonl among which the last step is looked for."""


@dataclass(frozen=True)
class Standing:
    """A run that was submitted."""

    job: str
    """`123`, or `123_4` for a member of an array."""
    state: str
    """As Slurm says it, in lower case, while it is in the queue; then how it ended."""
    step: int | None
    loss: float | None
    folder: Path


def standings(root: Path) -> tuple[list[Standing], str]:
    """The runs in a folder of runs and those in the queue, the latest first, and why the queue could not be asked.

    Args:
        root: A folder of runs, an array's folder, or a run folder.
    """
    try:
        queue, note = slurm_queue.queued(), ""
    except (UserError, CheckFailed) as error:
        queue, note = [], str(error).splitlines()[0]
    by_folder = {_folder_of(job): job for job in queue}
    there = {path.resolve(): job for top in _submitted(root) for path, job in _runs(top)}
    for path, job in by_folder.items():
        there.setdefault(path, job.id)
    over = slurm_queue.ended([job for path, job in there.items() if path not in by_folder])
    found = [_standing(path, job, by_folder.get(path), over.get(job, "")) for path, job in there.items()]
    return sorted(found, key=lambda row: [int(part) for part in row.job.split("_")], reverse=True), note


def find(name: str, root: Path) -> Standing:
    """The run of a job's number or of a run folder; of an array its first member.

    Raises:
        UserError: No run here was submitted as that.
    """
    if Path(name).is_dir():
        root, rows = Path(name), [row for row in standings(Path(name))[0] if Path(name).resolve() in _upwards(row)]
    else:
        rows = [row for row in standings(root)[0] if name in (row.job, row.job.partition("_")[0])]
    if rows:
        return rows[-1]
    known = tuple(row.job for row in standings(root)[0][:5])
    hint = "peft jobs --runs FOLDER looks in another folder of runs"
    raise UserError(Mistake(f"no run in {root} was submitted as job {name}", allowed=known, hint=hint))


def log_of(row: Standing) -> Path:
    """What the job of a run has printed."""
    return row.folder / f"slurm-{row.job}.log"


def _upwards(row: Standing) -> tuple[Path, Path]:
    return row.folder, row.folder.parent


def _folder_of(job: Job) -> Path:
    return job.folder if job.member is None else job.folder / f"{job.member:04}"


def _submitted(root: Path) -> Iterator[Path]:
    """The folders in and at a folder of which jobs were submitted."""
    for path in [root, *root.iterdir()] if root.is_dir() else ():
        if (path / slurm.JOBS).is_file() and not path.is_symlink():
            yield path


def _runs(top: Path) -> Iterator[tuple[Path, str]]:
    """Each run of a folder with its latest job."""
    if not slurm_array.is_array(top):
        yield top, slurm.jobs(top)[-1]["job"]
        return
    latest = {number: job["job"] for job in slurm.jobs(top) for number in slurm_array.numbers(job["members"])}
    for member in slurm_array.refresh(top):
        own = slurm.jobs(member.folder)  # submitted singly since
        job = own[-1]["job"] if own else f"{latest[member.number]}_{member.number}"
        yield member.folder, job


def _standing(folder: Path, number: str, job: Job | None, over: str) -> Standing:
    run = RunFolder(folder)
    last = _last(run)
    if job is not None:
        waits = f" ({job.reason})" if job.state == "PENDING" and job.reason != "None" else ""
        return Standing(job.id, job.state.lower() + waits, *last, folder)
    state = slurm_array.status(run)
    if state in ("started", "new"):  # the folder says nothing of an end
        state = over.lower() or "lost"
    elif state == "stopped" and over:
        state = f"stopped ({over.lower()})"
    return Standing(number, state, *last, folder)


def _last(run: RunFolder) -> tuple[int | None, float | None]:
    """The last step and its loss."""
    if not run.metrics_file.is_file():
        return None, None
    with open(run.metrics_file, "rb") as stream:
        stream.seek(max(0, run.metrics_file.stat().st_size - TAIL), os.SEEK_SET)
        lines = stream.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            row: dict[str, Any] = json.loads(line)
        except ValueError:  # cut off at either end
            continue
        if "loss" in row:
            return row["step"], row["loss"]
    return None, None
