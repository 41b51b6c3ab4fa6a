"""Submitting runs to Slurm: the folder and the script are made here, sbatch gets them, and nobody waits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.artifacts import atomic, run_folder
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import RunConfig, SlurmConfig
from peftcli.launch import slurm_array, slurm_queue, slurm_script

if TYPE_CHECKING:
    from peftcli.config.compose import Composed

JOBS = "jobs.jsonl"
"""File in a run folder or an array's with a line for each job that was submitted of it."""


@dataclass(frozen=True)
class Submission:
    """A job that Slurm has taken."""

    job: str
    folder: Path
    log: Path
    members: int | None = None
    """Members of an array."""


def settled(config: RunConfig) -> RunConfig:
    """The run as a node reads it: one worker for each GPU, and no array."""
    launch = config.launch
    assert isinstance(launch, SlurmConfig)
    if launch.gpus_per_node is not None:
        launch = replace(launch, processes=launch.gpus_per_node, device="cuda")
    return replace(config, launch=replace(launch, array=None, at_once=None))


def script(composed: Composed) -> str:
    """The script that `start` would submit; nothing is made."""
    launch, config = composed.config.launch, composed.config
    assert isinstance(launch, SlurmConfig)
    members = None
    if launch.array is not None:
        members = range(len(slurm_array.compose_members(composed)))
    ending = "" if members is None else slurm_array.ENDING
    folder = Path(config.output).expanduser().absolute() / (run_folder.stem(config) + ending)
    return slurm_script.text(launch, folder, members)


def start(composed: Composed) -> Submission:
    """Make the run folder, or that of an array with all its members, and submit it.

    Raises:
        UserError: The output folder cannot be written to; Slurm is not on this machine.
        CheckFailed: `slurm-refused`; no folder is left behind, unless the job may be in the queue all the same.
    """
    slurm_queue.find("sbatch")
    launch = composed.config.launch
    assert isinstance(launch, SlurmConfig)
    if launch.array is not None:
        folder = slurm_array.create([(settled(m.config), m.overrides) for m in slurm_array.compose_members(composed)])
        members: Sequence[int] | None = range(len(slurm_array.members(folder)))
    else:
        folder, members = RunFolder.create(settled(composed.config), composed.overrides).path, None
    try:
        return submit(folder.absolute(), launch, members)
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except CheckFailed as error:
        if "timed out" not in error.what.lower():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def again(folder: Path, launch: SlurmConfig) -> Submission:
    """Submit a run, or what is missing of an array, once more; each continues at its newest checkpoint.

    Raises:
        UserError: It is in the queue already, or an array has nothing left to do.
        CheckFailed: `slurm-refused`.
    """
    folder = folder.absolute()
    waiting = slurm_queue.of_folder(folder)
    if not slurm_array.is_array(folder):
        if waiting:
            raise UserError(f"{folder} is job {waiting[0].id}, which is {waiting[0].state.lower()}; peft jobs shows it")
        return submit(folder, launch, None)
    busy = {job.member if job.folder == folder.resolve() else int(job.folder.name) for job in waiting}
    left = [m.number for m in slurm_array.members(folder) if m.status != "done" and m.number not in busy]
    if not left:
        raise UserError(f"every member of {folder} is done, or in the queue; peft jobs {folder} shows them")
    last = (jobs(folder) or [{}])[-1]
    return submit(folder, replace(launch, at_once=last.get("at_once")), left)


def submit(folder: Path, launch: SlurmConfig, members: Sequence[int] | None) -> Submission:
    """Write the script into a folder and give it to sbatch.

    Raises:
        UserError: Slurm is not on this machine.
        CheckFailed: `slurm-refused`, with Slurm's words.
    """
    place = folder / slurm_script.FILE
    atomic.write_text(place, slurm_script.text(launch, folder, members))
    said = slurm_queue.call("sbatch", "--parsable", str(place))
    job = said.strip().splitlines()[-1].partition(";")[0]
    row: dict[str, Any] = {"job": job, "submitted": time.strftime("%Y-%m-%dT%H:%M:%S")}
    if members is not None:
        row |= {"members": slurm_script.ranges(members), "at_once": launch.at_once}
    with open(folder / JOBS, "a") as stream:
        stream.write(json.dumps(row) + "\n")
    log = folder / f"slurm-{job}.log"
    if members is not None:
        log = folder / f"{members[0]:04}" / f"slurm-{job}_{members[0]}.log"
    return Submission(job, folder, log, None if members is None else len(members))


def jobs(folder: Path) -> list[dict[str, Any]]:
    """The jobs that were submitted of a folder, the latest last."""
    file = folder / JOBS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
