"""One machine: this process, or several workers through torchrun's API."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from peftcli import fetch_no_kernels
from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import LaunchConfig
from peftcli.training.signals import StopRequest

FAILURE = "failure.json"
"""File in the run folder in which a worker leaves the message of its failure for the parent."""
LOUD = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
"""Loggers that wrap each end of a worker in a traceback of their own; what they know is in the error they raise."""


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


def start(run: Path, config: LaunchConfig, quiet: bool = False) -> dict[str, Any]:
    """Run the training of a run folder to its end and return its report.

    Raises:
        UserError: A mistake that shows only with the data or the model at hand.
        CheckFailed: A named check stopped the run.
    """
    if config.processes == 1:
        from peftcli.training.run import run as train

        return train(run, quiet=quiet)
    check(config)
    return _elastic(run, config, quiet)


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


def _elastic(run: Path, config: LaunchConfig, quiet: bool) -> dict[str, Any]:
    import uuid

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as Elastic
    from torch.distributed.launcher.api import elastic_launch

    from peftcli.config import frozen
    from peftcli.training import prepare

    (run / FAILURE).unlink(missing_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(prepare.threads(config))
    elastic = Elastic(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle="SIGHUP,SIGQUIT",  # at those torchrun ends the workers itself
    )
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    prepare.load_material(frozen.load(run / "config.yaml"))  # encoded once, before anybody waits for anybody
    with _Relay() as stop:
        try:
            elastic_launch(elastic, worker)(str(run), config.processes, quiet)
        except ChildFailedError as error:
            if failure := _failure_of(run):
                raise failure from error
            if stop.name:  # before the workers could listen
                return {"run": {"status": "stopped", "stopped_by": stop.name}}
            raise _lost(error.failures.values()) from error
    return json.loads((run / "report.json").read_text())


def _lost(failures: Iterable[Any]) -> CheckFailed:
    """The end of workers that left no message, the first first."""
    first = min(failures, key=lambda failure: failure.timestamp)
    killed = first.exitcode == -signal.SIGKILL
    return CheckFailed(
        "lost-worker",
        f"worker {first.local_rank} (process {first.pid}) ended without a message, "
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
    except UserError as error:
        _leave(Path(run), {"mistakes": [asdict(m) for m in error.mistakes]})
        raise SystemExit(2) from error
    except CheckFailed as error:
        _leave(Path(run), {"check": error.check, "what": error.what, "hint": error.hint})
        raise SystemExit(1) from error
    except Exception as error:
        if not (Path(run) / FAILURE).exists():  # else it is only that another worker is gone
            traceback.print_exc()
        raise SystemExit(1) from error


def _leave(run: Path, failure: dict[str, Any]) -> None:
    if not (run / FAILURE).exists():
        (run / FAILURE).write_text(json.dumps(failure))


def _failure_of(run: Path) -> Exception | None:
    if not (run / FAILURE).exists():
        return None
    failure = json.loads((run / FAILURE).read_text())
    if "mistakes" in failure:
        rows = [{**m, "allowed": tuple(m["allowed"])} for m in failure["mistakes"]]
        return UserError(*(Mistake(**m) for m in rows))
    return CheckFailed(**failure)
