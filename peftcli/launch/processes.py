"""The processes of one node: this process, or several workers through torchrun's API, which may meet other nodes'."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from peftcli import fetch_no_kernels
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import LaunchConfig
from peftcli.training.signals import StopRequest

FAILURE = "failure.json"
"""File in the run folder in which a worker leaves the message of its failure for the parent."""
WAITING = "waiting.json"
"""The same of a worker that waited in vain for the others."""
LOUD = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
"""Loggers that wrap each end of a worker in a traceback of their own; what they know is in the error they raise."""


@dataclass(frozen=True)
class Node:
    """One of the machines that train together; each has a launcher, which starts its share of the workers."""

    rank: int
    count: int
    endpoint: str
    """`address:port` at which the launcher of node 0 waits for the others."""
    job: str
    """Known to all of them, and to no other run."""
    name: str
    """What a person calls it."""


def check(config: LaunchConfig) -> None:
    """Refuse more processes than there is hardware for.

    Raises:
        UserError: With the number that is possible.
    """
    if config.processes == 1:
        return
    import torch

    from peftcli.artifacts.environment import cores

    on_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    most, unit = (torch.cuda.device_count(), "GPUs") if on_gpu else (cores(), "CPU cores")
    if config.processes > most:
        raise UserError(
            Mistake(
                f"launch.processes={config.processes}, but this machine has {most} {unit}",
                allowed=tuple(str(n) for n in range(1, most + 1)),
                hint="more processes than that would wait for each other; the batch an optimiser step sees does not "
                "depend on the number of processes",
            )
        )


def start(run: Path, config: LaunchConfig, quiet: bool = False, node: Node | None = None) -> dict[str, Any]:
    """Run the training of a run folder to its end and return its report, which on nodes but the first is empty.

    Args:
        run: The run folder.
        config: Its launch group; `processes` is of each node.
        quiet: Nothing on the screen but mistakes.
        node: Which of several machines this is; None where there is one.

    Raises:
        UserError: A mistake that shows only with the data or the model at hand.
        CheckFailed: A named check stopped the run.
    """
    if config.processes == 1 and node is None:
        from peftcli.training.run import run as train

        return train(run, quiet=quiet)
    check(config)
    return _elastic(run, config, quiet, node)


class _Relay(StopRequest):
    """Hands each request to stop on to the workers, which end at the same step; a second Ctrl-C kills them."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        workers = multiprocessing.active_children()
        try:
            super()._note(number, frame)
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
            raise
        for worker in workers:
            os.kill(worker.pid or 0, number)


def _elastic(run: Path, config: LaunchConfig, quiet: bool, node: Node | None) -> dict[str, Any]:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Elastic
    from torch.distributed.launcher.api import elastic_launch

    from peftcli.config import frozen
    from peftcli.models import fetching
    from peftcli.training import prepare

    if node is None or node.rank == 0:
        for name in (FAILURE, WAITING):
            (run / name).unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(prepare.threads(config))
    elastic = Elastic(
        min_nodes=node.count if node else 1,
        max_nodes=node.count if node else 1,
        nproc_per_node=config.processes,
        run_id=node.job if node else uuid.uuid4().hex,
        rdzv_backend="static" if node else "c10d",
        rdzv_endpoint=node.endpoint if node else "localhost:0",
        rdzv_configs={"rank": node.rank, "timeout": round(60 * config.timeout_minutes)} if node else {},
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT",  # at those torchrun ends the workers itself
    )
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with _Relay() as stop:
        whole = frozen.load(run / "config.yaml")
        fetching.fetch(whole.model)  # once, before anybody waits for anybody; the rows are encoded once too
        prepare.load_material(whole)
        if stop.name:
            return {"run": {"status": "stopped", "stopped_by": stop.name}}
        try:
            elastic_launch(elastic, worker)(str(run), config.processes * elastic.max_nodes, quiet)
        except DistError as error:
            if node is None:
                raise
            raise _apart(node, config.timeout_minutes, error) from error
        except ChildFailedError as error:
            if failure := _failure_of(run):
                raise failure from error
            if stop.name:  # before the workers could listen
                return {"run": {"status": "stopped", "stopped_by": stop.name}}
            killed = any(failure.exitcode < 0 for failure in error.failures.values())
            if not killed and (waited := _failure_of(run, WAITING)):
                raise waited from error
            raise _lost(error.failures.values(), node) from error
    return json.loads((run / "report.json").read_text()) if node is None or node.rank == 0 else {}


def _apart(node: Node, minutes: float, error: Exception) -> CheckFailed:
    """Launchers that did not meet: who waited where, and why it was in vain."""
    where, said = f"node {node.rank} of {node.count} ({node.name})", str(error).splitlines()[0]
    if "EADDRINUSE" in said:
        hint = "submit it again: another job has another port"
        return CheckFailed("rendezvous", f"{where} cannot wait for the others at {node.endpoint}: port in use", hint)
    return CheckFailed(
        "rendezvous",
        f"{where} waited {minutes:g} minutes for the others at {node.endpoint}: {said}",
        "a node whose own line is not above did not start; a firewall between nodes must let that port through; "
        "launch.timeout_minutes says how long to wait",
    )


def _lost(failures: Iterable[Any], node: Node | None) -> CheckFailed:
    """The end of workers that left no message, the first first."""
    where = f" on {node.name}" if node else ""
    # Of those that end within one look at them, the one that was killed is the cause.
    first = min(failures, key=lambda failure: (failure.exitcode >= 0, failure.timestamp))
    killed = first.exitcode == -signal.SIGKILL
    return CheckFailed(
        "lost-worker",
        f"worker {first.local_rank}{where} (process {first.pid}) ended without a message, "
        + (f"by {signal.Signals(-first.exitcode).name}" if first.exitcode < 0 else f"with exit code {first.exitcode}"),
        ("the system does that when memory runs out; " if killed else "see its lines above; ")
        + "nothing up to the newest checkpoint is lost",
    )


def worker(run: str, processes: int, quiet: bool) -> None:
    """What each worker process does: train from the run folder; leave the message of a failure there."""
    fetch_no_kernels()
    world = int(os.environ["WORLD_SIZE"])
    if world != processes:
        raise CheckFailed("lost-worker", f"{processes} processes were asked for, {world} were started")
    from peftcli.training.run import run as train

    try:
        train(Path(run), quiet=quiet)
    except (UserError, CheckFailed) as error:
        leave(Path(run), error)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from error
    except Exception as error:
        said, rank = str(error).strip().splitlines() or [""], os.environ["RANK"]
        _leave(
            Path(run),
            {
                "check": "lost-worker",
                "what": f"worker {rank} (process {os.getpid()}) failed: {type(error).__name__}: {said[0]}",
                "hint": "its traceback is above; nothing up to the newest checkpoint is lost",
                "traceback": traceback.format_exc(),
            },
        )
        raise SystemExit(1) from error


def leave(run: Path, error: UserError | CheckFailed) -> None:
    """Write the message of a worker or of a node's launcher into the run folder, where nobody has left one before."""
    if isinstance(error, UserError):
        _leave(run, {"mistakes": [asdict(m) for m in error.mistakes]})
    else:
        _leave(run, {"check": error.check, "what": error.what, "hint": error.hint})


def _leave(run: Path, failure: dict[str, Any]) -> None:
    """Write down why this worker ends. The first to fail is the cause; that others waited for it in vain is not."""
    name = WAITING if failure.get("check") == "waited" else FAILURE
    with suppress(FileExistsError):
        handle = os.open(run / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "w") as file:
            json.dump(failure, file)


def _failure_of(run: Path, name: str = FAILURE) -> Exception | None:
    if not (run / name).exists():
        return None
    failure = json.loads((run / name).read_text())
    if trace := failure.pop("traceback", ""):
        print(trace, file=sys.stderr, end="")
    if "mistakes" in failure:
        rows = [{**m, "allowed": tuple(m["allowed"])} for m in failure["mistakes"]]
        return UserError(*(Mistake(**m) for m in rows))
    return CheckFailed(**failure)
