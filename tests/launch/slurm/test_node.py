"""The launcher of a node: what it asks of Slurm's environment, and launchers that do not meet."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.compose import compose
from peftcli.config.errors import CheckFailed
from peftcli.config.schema import SlurmConfig
from peftcli.launch import node, processes, slurm
from peftcli.launch.processes import Node
from peftcli.launch.slurm_script import AGAIN, PORT

ENVIRONMENT = {
    "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    PORT: "23456",
}  # fmt: skip


@pytest.fixture
def run(recipe) -> RunFolder:
    composed = compose(str(recipe), ["launch=slurm", "launch.requeues=3", "launch.device=cpu"])
    return RunFolder.create(slurm.settled(composed.config))


@pytest.fixture
def within_a_job(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def test_outside_of_a_job_it_says_what_starts_it(run, capsys, monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert node.main(run.path) == 2
    assert "started by srun in the run's own batch script (SLURM_JOB_ID" in capsys.readouterr().err


def test_another_number_of_nodes_than_was_asked_for_is_a_mistake(run, capsys, within_a_job, monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert node.main(run.path) == 2
    assert "launch.nodes is 1, and Slurm gave 2 nodes" in capsys.readouterr().err


def test_a_run_that_is_done_is_left_alone_and_is_not_queued_again(run, capsys, within_a_job):
    run.write_report({"run": {"status": "done"}})
    (run.path / AGAIN).touch()
    assert node.main(run.path) == 0
    assert "already done" in capsys.readouterr().out
    assert not (run.path / AGAIN).exists()


def test_after_so_many_requeues_it_ends(run, capsys, within_a_job, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert node.main(run.path) == 1
    assert "requeues-used: the job went back into the queue 3 times" in capsys.readouterr().err


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_a_node_that_waits_in_vain_says_where_and_for_whom(run, port):
    launch = replace(SlurmConfig(), nodes=2, device="cpu", threads=1, timeout_minutes=0.02)
    first = Node(0, 2, f"127.0.0.1:{port}", "job", "n1")
    with pytest.raises(
        CheckFailed, match=rf"rendezvous: node 0 of 2 \(n1\) waited 0.02 minutes .*:{port}.*1/2 clients"
    ):
        processes.start(run.path, launch, quiet=True, node=first)
    second = replace(first, rank=1, name="n2")
    with pytest.raises(CheckFailed, match=r"rendezvous: node 1 of 2 \(n2\) waited .* timed out"):
        processes.start(run.path, launch, quiet=True, node=second)


def test_a_port_that_is_taken_is_named(run):
    launch = replace(SlurmConfig(), nodes=2, device="cpu", threads=1, timeout_minutes=0.02)
    with socket.create_server(("", 0)) as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CheckFailed, match=f"cannot wait for the others at {endpoint}: port in use"):
            processes.start(run.path, launch, quiet=True, node=Node(0, 2, endpoint, "job", "n1"))
