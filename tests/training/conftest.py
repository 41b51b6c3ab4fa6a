"""Runs in processes that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from peftcli.artifacts.run_folder import RunFolder

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "peftcli.training.run",
        "peftcli.methods.lora.tuner",
        "peftcli.methods.full.tuner",
        "peftcli.reports.page",
        "peftcli.reports.figures",
        "matplotlib.backends.backend_svg",
        "torchmetrics.functional.classification",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.tokenization_auto",
    ]
)


def _train(folder: Path, cache: str, event: str, at: int, number: int) -> None:
    """In a process of its own: train, and send this process a signal at an event."""
    os.environ["PEFTCLI_CACHE"] = cache
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from peftcli.training.run import run

    seen = 0

    def count(*_) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)

    if event:
        _hook(event, count)
    run(folder, quiet=True)


def _hook(event: str, count: Callable[..., None]) -> None:
    from peftcli.artifacts import atomic
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.training import checkpoints
    from peftcli.training.loop import StageLoop

    def before(owner, name: str) -> None:
        former = getattr(owner, name)

        def hooked(*args, **kwargs):
            count()
            return former(*args, **kwargs)

        setattr(owner, name, hooked)

    {
        "log": lambda: before(RunFolder, "log"),
        "tensors": lambda: before(atomic, "write_tensors"),
        "prune": lambda: before(checkpoints, "prune"),
        "stage": lambda: before(StageLoop, "run"),
    }[event]()


@pytest.fixture
def train(monkeypatch, tmp_path_factory):
    """`train(run)` trains to the end; `train(run, "log", 5)` kills the process before the fifth log row."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def start(run: RunFolder, event: str = "", at: int = 0, number: int = signal.SIGKILL) -> int:
        process = server.Process(target=_train, args=(run.path, str(cache), event, at, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return start
