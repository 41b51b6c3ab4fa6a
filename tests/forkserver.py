"""Processes that may be killed, started from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "peftcli.training.run",
        "peftcli.methods.lora.tuner",
        "peftcli.methods.full.tuner",
        "peftcli.methods.sdt.tuner",
        "peftcli.methods.kpsvd.tuner",
        "peftcli.reports.page",
        "peftcli.reports.figures",
        "matplotlib.backends.backend_svg",
        "torchmetrics.functional.classification",
        "transformers.models.llama.modeling_llama",
        "transformers.models.mamba.modeling_mamba",
        "transformers.models.auto.tokenization_auto",
    ]
)


def train_and_signal(folder: Path, cache: str, event: str, at: int, number: int) -> None:
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
    from peftcli.training import checkpoints, closing
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
        "finish": lambda: before(closing, "evaluate"),
    }[event]()
