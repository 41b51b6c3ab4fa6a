"""Asked to stop, killed, or without a worker: what was trained is on disk, and one command goes on with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from filelock import FileLock

from peftcli.artifacts.run_folder import RunFolder
from peftcli.training import checkpoints
from tests.commands import Command, assert_said, wait_until

LONG = ["training.max_steps=100000", "training.eval_every=end"]
"""Longer than any test waits."""
TWO = ["--processes=2"]


@pytest.fixture
def running(start, recipe, tmp_path):
    """`running(...)` is a run that has taken some steps, and its folder."""

    def begin(*given: str) -> tuple[Command, RunFolder]:
        command = start("train", recipe, *LONG, *given)

        def stepping() -> bool:
            [*found] = (tmp_path / "runs").glob("2*/metrics.jsonl")
            return bool(found) and found[0].stat().st_size > 1000

        wait_until(stepping, lambda: command.output)
        [log] = (tmp_path / "runs").glob("2*/metrics.jsonl")
        return command, RunFolder.open(log.parent)

    return begin


def resumable(run: RunFolder) -> int:
    """The step of a run's newest checkpoint, which is whole; nothing half-written is beside it."""
    found = checkpoints.latest(run.checkpoints)
    assert found is not None
    assert not run.adapter.exists()
    assert [p.name for p in run.path.rglob("*.partial")] == []
    return found.progress.step


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_leaves_a_checkpoint_and_names_the_way_on(running, number, code):
    command, run = running()
    command.send(number)
    assert_said(command, code, f"stopped by {number.name}", f"continue with: peft train --resume {run.path}")
    step = resumable(run)
    assert run.status == "stopped"
    assert run.read_report()["run"]["stopped_by"] == number.name
    assert run.metrics()[-1]["step"] == step


def test_ctrl_c_at_the_real_program_and_the_way_on(recipe, tmp_path, tmp_path_factory):
    environ = os.environ | {"PEFTCLI_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    code = "from peftcli.cli.main import main; main()"
    program = [sys.executable, "-c", code, "train"]
    with subprocess.Popen(
        [*program, recipe, *LONG], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        wait_until(lambda: any(p.stat().st_size > 1000 for p in (tmp_path / "runs").glob("2*/metrics.jsonl")))
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    [folder] = (tmp_path / "runs").glob("2*")
    assert process.returncode == 130, printed
    assert f"peft train --resume {folder}" in printed
    assert "Traceback" not in printed
    assert resumable(RunFolder.open(folder)) >= 1


def test_a_second_ctrl_c_ends_at_once(start, recipe, tmp_path):
    """The first one waits for a step of seconds."""
    train = tmp_path / "train.jsonl"
    texts = [f"{' '.join(['the film was'] * 80)} {i}" for i in range(900)]
    train.write_text("".join(f'{{"text": "{text}", "label": "{("good", "bad")[len(text) % 2]}"}}\n' for text in texts))
    given = [f"data.files.train={train}", "training.batch_size=900", "training.eval_every=end"]
    command = start("train", recipe, *given)
    wait_until(lambda: "parameters are trained" in command.output)
    command.send(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again ends at once" in command.output)  # two signals during one kernel would be one
    command.send(signal.SIGINT)
    assert_said(command, 130, "Ctrl-C again ends at once", "stopped by Ctrl-C", "peft train --resume")


def test_a_stopped_run_ends_as_one_that_was_not(start, recipe, peft, tmp_path):
    given = ["training.max_steps=60", "training.eval_every=20"]
    whole = start("train", recipe, *given, f"output={tmp_path / 'whole'}")
    parts = start("train", recipe, *given)
    wait_until(lambda: any(p.stat().st_size > 2000 for p in (tmp_path / "runs").glob("2*/metrics.jsonl")))
    parts.send(signal.SIGINT)
    assert parts.exit_code in (0, 130)  # it may have been at its end already
    [one], [two] = (list((tmp_path / name).glob("2*")) for name in ("whole", "runs"))
    assert_said(peft("train", "--resume", two), 0)
    assert_said(whole, 0)
    one, two = RunFolder.open(one), RunFolder.open(two)
    assert one.read_report()["quality"] == two.read_report()["quality"]
    weights = "adapter_model.safetensors"
    assert (one.adapter / weights).read_bytes() == (two.adapter / weights).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_two_processes_ends_both_with_a_checkpoint(running, number, code):
    command, run = running(*TWO)
    children = psutil.Process(command.pid).children(recursive=True)
    assert len(children) >= 2
    command.send(number)
    assert_said(command, code, f"continue with: peft train --resume {run.path}")
    resumable(run)
    assert run.status == "stopped"
    assert run.read_report()["run"]["stopped_by"] == number.name
    wait_until(lambda: not any(child.is_running() for child in children))


@pytest.mark.slow
def test_a_second_ctrl_c_to_two_processes_leaves_none_behind(running):
    command, _ = running(*TWO)
    children = psutil.Process(command.pid).children(recursive=True)
    command.send(signal.SIGINT)
    command.send(signal.SIGINT)
    assert_said(command, 130, "Ctrl-C again ends at once", "peft train --resume")
    wait_until(lambda: not any(child.is_running() for child in children))


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_nothing_with_it(running):
    command, run = running(*TWO, "training.save_every=2")
    wait_until(lambda: bool(checkpoints.complete(run.checkpoints)))
    workers = [p for p in psutil.Process(command.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[-1].kill()
    assert command.exit_code == 1
    assert "failed: lost-worker: worker 1 (process" in command.output
    assert "ended without a message, by SIGKILL" in command.output
    assert f"peft train --resume {run.path}" in command.output
    resumable(run)


@pytest.mark.slow
def test_a_mistake_that_two_workers_meet_is_said_once_and_plainly(start, recipe, tmp_path):
    command = start("train", recipe, *TWO, "method.targets=[nonsense]")
    assert_said(command, 1, "failed: dead-target", "nonsense")
    assert command.output.count("dead-target") == 1
    command = start("train", recipe, *TWO, f"data.files.train={tmp_path / 'gone.jsonl'}")
    assert_said(command, 2, "mistake: ", "gone.jsonl")


def test_a_mistake_while_resuming_removes_nothing(peft, make_run):
    """A run may have looked for hours at its rows before its first step."""
    run = make_run()
    before = run.config.read_text()
    assert_said(peft("train", "--resume", run.path, "--processes=9999"), 2, "launch.processes=9999")
    with FileLock(run.path / ".lock"):
        assert_said(peft("train", "--resume", run.path), 2, "is being trained by another process")
    assert run.config.read_text() == before
