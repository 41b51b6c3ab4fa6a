"""What a Slurm job starts once on each node: `python -m peftcli.launch.node RUN`. It launches that node's workers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from peftcli import fetch_no_kernels
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, UserError
from peftcli.config.schema import SlurmConfig
from peftcli.launch import slurm_array
from peftcli.launch.processes import FAILURE, Node, leave, start
from peftcli.launch.slurm_script import AGAIN, PORT
from peftcli.training.signals import StopRequest


def main(run: Path) -> int:
    """Train this node's share of a run to its end, or to where it was told to stop.

    Returns:
        0 done or stopped, 1 failed, 2 the user's mistake.
    """
    with StopRequest(patient=True) as stop:
        fetch_no_kernels()
        try:
            return _train(RunFolder.open(run), stop)
        except (UserError, CheckFailed) as error:
            label = "failed" if isinstance(error, CheckFailed) else "mistake"
            for line in getattr(error, "mistakes", [error]):
                print(f"{label}: {line}", file=sys.stderr)
            print(f"the run is in {run}; when the cause is mended: peft train --resume {run}", file=sys.stderr)
            return 1 if isinstance(error, CheckFailed) else 2
        finally:
            if slurm_array.is_array(run.parent) and _is_first():
                slurm_array.refresh(run.parent)


def _train(run: RunFolder, stop: StopRequest) -> int:
    launch, restarts = frozen.load(run.config).launch, int(os.environ.get("SLURM_RESTART_COUNT", 0))
    assert isinstance(launch, SlurmConfig)
    if _is_first():
        (run.path / AGAIN).unlink(missing_ok=True)
    if run.status == "done":  # a node failed when there was nothing more to do
        print(f"{run.path} is already done")
        return 0
    if restarts > launch.requeues:
        raise _used_up(launch)
    node = _here(launch)
    if node.rank == 0:
        (run.path / FAILURE).unlink(missing_ok=True)
    if launch.nodes > 1:
        print(f"node {node.rank} of {node.count} ({node.name}) meets the others at {node.endpoint}", flush=True)
    if stop.name:
        report: dict[str, Any] = {"run": {"status": "stopped"}}
    else:
        try:
            report = start(run.path, launch, node=node if launch.nodes > 1 else None)
        except (UserError, CheckFailed) as error:
            leave(run.path, error)
            raise
    if node.rank > 0:
        return 0
    if report["run"]["status"] == "stopped":
        if restarts == launch.requeues:
            raise _used_up(launch)
        (run.path / AGAIN).touch()
        print(f"where Slurm does not queue it again by itself: peft train --resume {run.path}")
        return 0
    from peftcli.reports.terminal import show

    show(report)
    return 0


def _here(launch: SlurmConfig) -> Node:
    """This node among the job's, from what Slurm says.

    Raises:
        UserError: This is no such job, or one of another number of nodes.
    """
    environ = os.environ
    needed = ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_LAUNCH_NODE_IPADDR", PORT)
    if missing := [name for name in needed if name not in environ]:
        raise UserError(f"this is started by srun in the run's own batch script ({', '.join(missing)} not set)")
    job, rank, count, address, port = (environ[name] for name in needed)
    if int(count) != launch.nodes:
        raise UserError(f"launch.nodes is {launch.nodes}, and Slurm gave {count} nodes")
    name = environ.get("SLURMD_NODENAME", f"node {rank}")
    # The address at which srun waits for its tasks: every node reaches it, or would not have been started.
    return Node(int(rank), int(count), f"{address}:{port}", f"{job}.{environ.get('SLURM_RESTART_COUNT', 0)}", name)


def _is_first() -> bool:
    return os.environ.get("SLURM_NODEID", "0") == "0"


def _used_up(launch: SlurmConfig) -> CheckFailed:
    return CheckFailed(
        "requeues-used",
        f"the job went back into the queue {launch.requeues} times, which is what launch.requeues allows",
        "nothing up to the newest checkpoint is lost",
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
