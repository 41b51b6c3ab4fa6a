"""Runs in processes that may be killed."""

from __future__ import annotations

import signal

import pytest

from peftcli.artifacts.run_folder import RunFolder
from tests.forkserver import server, train_and_signal


@pytest.fixture
def train(monkeypatch, tmp_path_factory):
    """`train(run)` trains to the end; `train(run, "log", 5)` kills the process before the fifth log row."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def start(run: RunFolder, event: str = "", at: int = 0, number: int = signal.SIGKILL) -> int:
        process = server.Process(target=train_and_signal, args=(run.path, str(cache), event, at, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return start
