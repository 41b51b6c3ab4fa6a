"""Two processes on one machine: what goes wrong is named within seconds, and nothing that was saved is lost."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed
from peftcli.launch import processes
from peftcli.launch.processes import Node
from peftcli.training import checkpoints
from tests.commands import Command, wait_until
from tests.forkserver import server

LONG = ["training.max_steps=100000", "training.eval_every=end", "training.save_every=5"]


@pytest.fixture
def stepping(start, recipe, tmp_path):
    """`stepping(...)` is a run of two processes that has taken some steps, its folder, and its workers."""

    def begin(*given: str) -> tuple[Command, RunFolder, list[psutil.Process]]:
        command = start("train", recipe, "--processes=2", *LONG, *given)

        def on_its_way() -> bool:
            found = run_folders(tmp_path / "runs")
            return bool(found) and bool(checkpoints.complete(RunFolder.open(found[0]).checkpoints))

        wait_until(on_its_way, lambda: command.output)
        children = psutil.Process(command.pid).children()
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return command, RunFolder.open(run_folders(tmp_path / "runs")[0]), workers

    return begin


def resumable(run: RunFolder) -> int:
    found = checkpoints.latest(run.checkpoints)
    assert found is not None
    return found.progress.step


def _tight(rank: int, run: Path, meeting: Path) -> None:
    """A worker; to the second one the system gives 48 MiB more than it has, and then no more."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 0}
    os.environ |= {"MASTER_ADDR": "localhost"} | {name: str(value) for name, value in names.items()}
    import torch.distributed as dist

    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=patience)
    if rank:
        most = psutil.Process().memory_info().vms + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    processes.worker(str(run), 2, True)


@pytest.mark.slow
def test_one_worker_without_memory_is_the_one_that_is_named(make_run, tmp_path, rows) -> None:
    texts = [f"{' '.join(['the film was'] * 70)} {i}" for i in range(300)]
    lines = [json.dumps({"text": text, "label": ("good", "bad")[i % 2]}) for i, text in enumerate(texts)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    files = {**rows, "train": str(tmp_path / "long.jsonl")}
    run = make_run(launch={"processes": 2}, data={"files": files}, training={"batch_size": 300})
    members = [server.Process(target=_tight, args=(rank, run.path, tmp_path / "meeting")) for rank in (0, 1)]
    for member in members:
        member.start()
    for member in members:
        member.join(100)
    assert [member.exitcode for member in members] == [1, 1]
    failure = processes._failure_of(run.path)
    assert "out-of-memory" in str(failure)
    assert "training.micro_batch_size" in str(failure)
    waited = processes._failure_of(run.path, processes.WAITING)
    assert waited is None or "rank 1 (" in str(waited)


@pytest.mark.slow
def test_one_worker_that_hangs_is_named_with_its_step(stepping) -> None:
    command, run, workers = stepping("launch.timeout_minutes=0.1")
    workers[-1].send_signal(signal.SIGSTOP)
    assert command.exit_code == 1
    assert "failed: waited" in command.output
    # A worker is held wherever it was, and its rank is not its place in the list.
    assert re.search(r"rank [01] \(\S+, process \d+: (step|a checkpoint after step) \d+\)", command.output)
    assert str(workers[-1].pid) in command.output
    assert resumable(run)
    wait_until(lambda: not any(worker.is_running() for worker in workers))


def test_a_port_that_is_in_use_is_named(make_run) -> None:
    run = make_run(launch={"processes": 2})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        config = replace(frozen.load(run.config).launch, timeout_minutes=0.1)
        with pytest.raises(CheckFailed, match=f"{where}: port in use"):
            processes.start(run.path, config, quiet=True, node=Node(0, 1, where, "job", "here"))


def test_the_traceback_of_the_first_to_fail_is_shown(make_run, capsys) -> None:
    run = make_run(launch={"processes": 2})
    trace = "Traceback (most recent call last): in the first"
    first = {"check": "lost-worker", "what": "worker 1 failed: ValueError: x", "hint": "", "traceback": trace}
    processes._leave(run.path, first)
    processes._leave(run.path, first | {"what": "worker 0 failed: ValueError: y", "traceback": "another"})
    processes._leave(run.path, {"check": "waited", "what": "", "hint": ""})
    failure = processes._failure_of(run.path)
    assert "worker 1 failed" in str(failure)
    assert capsys.readouterr().err == trace
