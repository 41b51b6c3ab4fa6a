"""What Slurm says of jobs: squeue of those that wait or run, sacct, where it is kept, of those that have ended."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.launch.slurm_script import FILE

PATIENCE = 60.0
"""Seconds after which Slurm is taken for lost."""


@dataclass(frozen=True)
class Job:
    """A job in the queue, or one member of an array there."""

    id: str
    """`123`, or `123_4` for a member."""
    state: str
    reason: str
    script: Path

    @property
    def folder(self) -> Path:
        """The run folder, or that of the array."""
        return self.script.parent.resolve()

    @property
    def member(self) -> int | None:
        """Number of the member of an array."""
        number = self.id.partition("_")[2]
        return int(number) if number.isdigit() else None


def find(program: str) -> str:
    """The path of one of Slurm's programs.

    Raises:
        UserError: It is not here.
    """
    if found := shutil.which(program):
        return found
    hint = "submit from a login node of the cluster; --print-script shows what would be submitted"
    raise UserError(Mistake(f"{program} is not on this machine, so there is no Slurm to ask", hint=hint))


def call(program: str, *arguments: str) -> str:
    """What one of Slurm's programs prints.

    Raises:
        UserError: It is not here.
        CheckFailed: `slurm-refused`, with its own words.
    """
    command = [find(program), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        hint = "look with peft jobs before you try again: it may have been taken all the same"
        raise CheckFailed("slurm-refused", f"{program} timed out after {PATIENCE:g} s", hint) from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split()) or f"{program} ended with exit code {done.returncode}"
        raise CheckFailed("slurm-refused", words)
    return done.stdout


def queued() -> list[Job]:
    """This user's jobs that `peft train` made, each member of an array on its own.

    Raises:
        UserError: There is no Slurm here.
        CheckFailed: `slurm-refused`, it does not answer.
    """
    found = []
    for line in call("squeue", "--me", "--array", "--noheader", "--format=%i|%T|%r|%o").splitlines():
        number, state, reason, script = line.split("|", 3)
        if Path(script).name == FILE:
            found.append(Job(number, state, reason, Path(script)))
    return found


def of_folder(folder: Path) -> list[Job]:
    """The jobs in the queue that train in a run folder, a member's own or its array's, or in an array's folder."""
    folder, member = folder.resolve(), int(folder.name) if folder.name.isdigit() else None
    return [
        job
        for job in queued()
        if job.folder == folder
        or (job.folder == folder.parent and member is not None and job.member == member)
        or (job.folder.parent == folder and job.folder.name.isdigit())
    ]


def ended(numbers: list[str]) -> dict[str, str]:
    """How jobs that are no longer in the queue ended, as far as the cluster keeps accounts."""
    if not numbers or not shutil.which("sacct"):
        return {}
    try:
        said = call(
            "sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(numbers)}"
        )
    except CheckFailed:  # accounting is off
        return {}
    return {
        number: state.split()[0] for number, _, state in (line.partition("|") for line in said.splitlines()) if state
    }
