"""On a real Slurm of two nodes: interrupted in each way that a cluster knows, a run ends with the bits of one that
was not."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.training import checkpoints
from tests.commands import assert_said
from tests.launch.slurm.conftest import STEPS, Cluster, said, wait_until, weights

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
TWO_NODES = ["launch.nodes=2", "launch.time=30m"]
ONE_NODE = ["launch.time=30m"]


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in RunFolder(folder).metrics() if "loss" in row]


def processes(job: str, program: str, words: str) -> list[psutil.Process]:
    """Those of a job that run a program with these words among its arguments."""
    of_job = [p for p in psutil.process_iter() if _is_of(p, job)]
    return [p for p in of_job if p.cmdline()[:1] == [program] and words in " ".join(p.cmdline())]


def _is_of(process: psutil.Process, job: str) -> bool:
    try:
        return process.environ().get("SLURM_JOB_ID") == job and "SLURM_NODEID" in process.environ()
    except psutil.Error:
        return False


def is_told_to_end(process: psutil.Process) -> bool:
    """A SIGTERM waits for a process that was held, or Slurm has let it go on to its end."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return True
    about = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return not about["State"].startswith("T") or bool(int(about["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def test_two_nodes_displaced_by_others_end_as_two_processes_that_nobody_disturbed(cluster: Cluster, undisturbed):
    job, folder = cluster.submit(*TWO_NODES)
    cluster.wait_for_steps(folder)
    assert cluster.standing(folder)[job]["state"] == "running"
    cluster.ask("scontrol", "requeue", job)
    wait_until(lambda: cluster.detail(job, "Restarts") == "1" and cluster.state(job) in ("PENDING", "RUNNING"))
    stopped = checkpoints.latest(folder / "checkpoints").progress.step
    assert RunFolder(folder).read_report()["run"]["stopped_by"] == "SIGTERM"
    cluster.wait(job, "COMPLETED")
    log = said(folder / f"slurm-{job}.log")
    assert "node 0 of 2 (n1)" in log
    assert "node 1 of 2 (n2)" in log
    assert f"continuing after step {stopped}" in log
    assert steps(folder) == list(range(1, STEPS + 1))
    assert weights(folder) == weights(undisturbed)
    assert RunFolder(folder).read_report()["quality"] == RunFolder(undisturbed).read_report()["quality"]
    row = cluster.standing(folder)[job]
    assert (row["state"], row["step"]) == ("done", STEPS)


def test_at_its_time_limit_a_run_queues_itself_and_goes_on(cluster: Cluster, undisturbed):
    job, folder = cluster.submit(*TWO_NODES)
    cluster.wait_for_steps(folder)
    held = [*processes(job, sys.executable, "peftcli.launch.node"), *processes(job, sys.executable, "spawn_main")]
    assert len(held) == 4
    for process in held:  # until Slurm's own timer has come round: 120 s (launch.warning) before the limit
        process.suspend()
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    wait_until(lambda: all(map(is_told_to_end, held)))
    for process in held:
        with suppress(psutil.NoSuchProcess):
            process.resume()
    wait_until(lambda: cluster.detail(job, "Restarts") == "1")
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert RunFolder(folder).status == "stopped"
    cluster.wait(job, "COMPLETED")
    assert "continuing after step" in said(folder / f"slurm-{job}.log")
    assert weights(folder) == weights(undisturbed)


def test_a_worker_that_is_killed_ends_the_job_at_once_and_is_not_queued_again(cluster: Cluster, undisturbed, peft):
    job, folder = cluster.submit(*TWO_NODES)
    cluster.wait_for_steps(folder)
    workers = processes(job, sys.executable, "spawn_main")
    assert len(workers) == 2
    workers[-1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    cluster.wait(job, "FAILED")
    assert time.monotonic() - began < 90  # of the 10 minutes for which processes wait
    assert cluster.detail(job, "Restarts") == "0"
    log = said(folder / f"slurm-{job}.log")
    assert "lost-worker: worker 0 on n" in log
    assert "by SIGKILL" in log
    assert f"peft train --resume {folder}" in log
    assert not RunFolder(folder).adapter.exists()
    second = cluster.again(folder)
    refused = peft("train", "--resume", folder)
    assert_said(refused, 2, f"is job {second}")
    cluster.wait(second, "COMPLETED")
    assert weights(folder) == weights(undisturbed)


def test_a_cancelled_run_leaves_a_checkpoint_and_is_not_queued_again(cluster: Cluster, peft):
    job, folder = cluster.submit(*ONE_NODE, "training.max_steps=100000")
    cluster.wait_for_steps(folder)
    assert "step" in peft("jobs", "logs", job, "--runs", folder.parent).output or said(folder / f"slurm-{job}.log")
    assert_said(peft("jobs", "cancel", folder), 0, f"job {job} is being cancelled")
    cluster.wait(job, "CANCELLED")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"))
    run = RunFolder(folder)
    assert run.status == "stopped"
    assert checkpoints.latest(run.checkpoints).progress.step == run.metrics()[-1]["step"]
    assert cluster.detail(job, "Restarts") == "0"
    assert cluster.standing(folder)[job]["state"] == "stopped"


def test_a_job_goes_back_into_the_queue_only_so_often(cluster: Cluster):
    job, folder = cluster.submit(*ONE_NODE, "launch.requeues=0", "training.max_steps=100000")
    cluster.wait(job, "RUNNING")
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(job, "FAILED")
    assert "failed: requeues-used: the job went back into the queue 0 times" in said(folder / f"slurm-{job}.log")


def test_what_is_missing_of_an_array_is_submitted_again(cluster: Cluster, tmp_path, peft):
    lines = tmp_path / "seeds.txt"
    lines.write_text("# two seeds\nseed=1\nseed=2 optim.lr=1e-3\n")
    job, folder = cluster.submit(*ONE_NODE, "training.max_steps=3", "--array", lines, "launch.at_once=1")
    cluster.ask("scancel", f"{job}_1")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), lambda: cluster.ask("squeue"))

    def table() -> list[list[str]]:
        with open(folder / "members.csv") as file:
            return [row[:2] for row in csv.reader(file)][1:]

    assert table() == [["0000", "done"], ["0001", "new"]]
    second = cluster.again(folder)
    assert_said(peft("train", "--resume", folder), 2, "every member", "is done, or in the queue")
    wait_until(lambda: not cluster.ask("squeue", "--noheader"), lambda: cluster.ask("squeue"))
    assert [status for _, status in table()] == ["done"] * 2
    assert set(cluster.standing(folder)) == {f"{job}_0", f"{second}_1"}
    assert RunFolder(folder / "0001").read_report()["run"]["seed"] == 2


def test_the_real_sbatch_reads_every_directive(cluster: Cluster, peft, recipe, tmp_path):
    (tmp_path / "lines.txt").write_text("seed=1\nseed=2\n")
    given = ["launch.partition=main", "launch.nodes=2", "launch.cpus_per_task=1", "launch.mem='0'", "launch.time=20m"]
    printed = peft("train", recipe, "launch=slurm", *given, "launch.options=['--nice=5']", "--print-script")
    assert_said(printed, 0)
    assert_said(again := peft("train", recipe, "launch=slurm", "--array", tmp_path / "lines.txt", "--print-script"), 0)
    for text in (printed.stdout, again.stdout):
        script = tmp_path / "slurm.sh"
        script.write_text(text)
        done = subprocess.run(["sbatch", "--test-only", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "to start at" in done.stderr
    assert not (tmp_path / "runs").exists()
