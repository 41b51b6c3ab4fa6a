"""The batch script of a run: what sbatch reads, what a person reads, and what puts the job back into the queue.

Who is told what, and by which signal:

- Before the time limit Slurm sends SIGTERM to the job's steps (`--signal=TERM@...` without `B:`): to the launcher of
  each node and its workers, not to this script. They leave a checkpoint, all launchers end with 0, the first one leaves
  `AGAIN`, and the script, which is still there, puts the job back into the queue.
- On preemption, `scontrol requeue`, `scancel` and when a node fails, Slurm sends SIGCONT and SIGTERM to all of them and
  to the script, which ends at once; launchers and workers have the cluster's KillWait (30 s as a rule) for their
  checkpoint. Whether the job goes back into the queue is then Slurm's to decide (`--requeue` allows it).
- Where the launcher of one node fails, srun ends the others (`--kill-on-bad-exit`), by SIGTERM too: they leave `AGAIN`
  and srun ends with the code of the one that failed. So the script asks for both, and a run that is done, or failed,
  goes nowhere.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from peftcli import __version__
from peftcli.config import durations
from peftcli.config.schema import SlurmConfig

FILE = "slurm.sh"
"""The script's name in a run folder, or in an array's."""
AGAIN = ".again"
"""File in a run folder by which the launcher of the first node says that the run was told to stop and can go on."""
PORT = "PEFTCLI_PORT"
"""Environment variable with the port at which launchers meet."""

BODY = """\
#!/bin/bash
# Written by peft train, version {version}. To submit it again: peft train --resume {folder}
{directives}

run={folder}{number}
job={job}
{setup}
# The launchers of the nodes meet on the first one, where this script runs: at a port from the number of the job, or at
# the next one where nobody listens.
export {port}=$((20000 + SLURM_JOB_ID % 12000))
while (: > "/dev/tcp/127.0.0.1/${port}") 2> /dev/null; do {port}=$(({port} + 1)); done

{srun} -P -m peftcli.launch.node "$run"
code=$?

# The run was told to stop before its time limit, and its checkpoint is there. A cancelled job is not RUNNING any more.
# One that others displace does not come here: Slurm ends this script, and puts the job back into the queue itself.
if [ $code = 0 ] && [ -e "$run/{again}" ] \\
    && [ "$(squeue --noheader --jobs "$job" --format %T)" = RUNNING ]; then
    scontrol requeue "$job"
fi
exit $code
"""


def directives(launch: SlurmConfig, name: str, log: Path, members: Sequence[int] | None = None) -> dict[str, str]:
    """The options of sbatch by name; one without a value has the empty text.

    Args:
        launch: The launch group.
        name: Of the job.
        log: Where its output goes, with Slurm's patterns.
        members: Numbers of the members of an array.
    """
    gpus = [part for part in ("gpu", launch.gpu_type, launch.gpus_per_node) if part is not None]
    at_once = f"%{launch.at_once}" if launch.at_once else ""
    asked = {
        "job-name": name,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": launch.cpus_per_task,
        "gres": ":".join(map(str, gpus)) if launch.gpus_per_node else None,
        "mem": launch.mem,
        "time": durations.slurm(launch.time) if launch.time else None,
        "array": f"{ranges(members)}{at_once}" if members is not None else None,
        "signal": f"TERM@{launch.warning}",
        "requeue": "",
        "open-mode": "append",
        "output": log,
    }
    return {option: str(value) for option, value in asked.items() if value is not None}


def text(launch: SlurmConfig, folder: Path, members: Sequence[int] | None = None) -> str:
    """The whole script.

    Args:
        launch: The launch group.
        folder: The run folder, or that of an array.
        members: Numbers of the members of an array.
    """
    in_output = str(folder).replace("%", "%%")
    log = Path(in_output, "slurm-%j.log" if members is None else "%4a/slurm-%A_%a.log")
    asked = directives(launch, folder.name, log, members)
    lines = [f"#SBATCH --{option}{f'={_quoted(value)}' if value else ''}" for option, value in asked.items()]
    lines += [f"#SBATCH {option}" for option in launch.options]
    number = '/$(printf %04d "$SLURM_ARRAY_TASK_ID")' if members is not None else ""
    return BODY.format(
        version=__version__,
        folder=shlex.quote(str(folder)),
        directives="\n".join(lines),
        number=number,
        # Of an array one member has the array's own number, by which Slurm would take all of them.
        job='"$SLURM_JOB_ID"' if members is None else '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"',
        setup="".join(f"{line}\n" for line in launch.setup),
        srun=_srun(launch),
        port=PORT,
        again=AGAIN,
    )


def _srun(launch: SlurmConfig) -> str:
    """One launcher a node. srun does not take over --cpus-per-task from sbatch, and must not end the first node's
    launcher, which measures and saves, some time after the others are done (--wait=0)."""
    words = ["srun", "--export=ALL", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0"]
    words += [f"--cpus-per-task={launch.cpus_per_task}"] if launch.cpus_per_task else []
    words += ["--label"] if launch.nodes > 1 else []
    words += [launch.container] if launch.container else []
    return " ".join([*words, shlex.quote(launch.python or ("python" if launch.container else sys.executable))])


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as sbatch reads them: `0-3,7`."""
    ordered = sorted(set(numbers))
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(ordered), 1) if b != a + 1), len(ordered)]
    parts = [(ordered[a], ordered[b - 1]) for a, b in pairwise(cuts) if a < b]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _quoted(value: str) -> str:
    """sbatch takes the line apart at spaces, and knows double quotes."""
    return value if re.fullmatch(r"[^\s\"'#]+", value) else '"' + value.replace('"', '\\"') + '"'
