"""Killed anywhere, a resumed run ends with the bits of an uninterrupted one."""

from __future__ import annotations

import random
import signal

import pytest

from peftcli.config.errors import CheckFailed
from peftcli.methods.full.settings import Settings as Full
from peftcli.training import checkpoints

TIMES = {"seconds", "waited", "memory_bytes"}


def deterministic(run) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()]


def weights(run) -> bytes:
    folder = run.adapter if run.adapter.is_dir() else run.model
    return next(folder.glob("*.safetensors")).read_bytes()


def assert_same(run, other) -> None:
    assert run.status == other.status == "done"
    assert deterministic(run) == deterministic(other)
    assert weights(run) == weights(other)
    assert run.read_report()["quality"] == other.read_report()["quality"]


@pytest.fixture
def reference(make_run, train):
    run = make_run()
    assert train(run) == 0
    return run


@pytest.mark.parametrize(
    ("event", "at"),
    [
        pytest.param("log", 1, id="before the first checkpoint"),
        pytest.param("log", 6, id="past a checkpoint, with log rows to cut"),
        pytest.param("tensors", 4, id="inside the second checkpoint's tensors"),
        pytest.param("prune", 2, id="after a checkpoint, before the old one goes"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(make_run, train, reference, event, at):
    run = make_run()
    assert train(run, event, at) == -signal.SIGKILL
    assert run.status == "unfinished"
    assert train(run) == 0
    assert_same(run, reference)


def test_a_run_killed_again_and_again_resumes_bit_for_bit(make_run, train, reference):
    run, draw = make_run(), random.Random(1)
    for _ in range(3):
        assert train(run, draw.choice(["log", "tensors"]), draw.randint(2, 3)) == -signal.SIGKILL
    assert train(run) == 0
    assert_same(run, reference)


@pytest.mark.parametrize(("event", "at"), [("stage", 2), ("log", 3), ("log", 7)])
def test_a_kill_around_a_stage_change_resumes_bit_for_bit(make_run, train, event, at):
    def make():
        method, task = Full(head_first=0.5), {"head": "linear"}
        return make_run(method=method, task=task, training={"max_steps": 6, "eval_every": 2}, optim={"lr": 1e-3})

    reference, run = make(), make()
    assert train(reference) == 0
    assert {row["stage"] for row in reference.metrics()} == {"head", "all"}
    assert train(run, event, at) == -signal.SIGKILL
    assert train(run) == 0
    assert_same(run, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(make_run, train, reference, number):
    run = make_run()
    assert train(run, "log", 2, number) == 0
    assert run.status == "stopped"
    assert checkpoints.latest(run.checkpoints).progress.step in (2, 3)
    assert train(run) == 0
    assert_same(run, reference)


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_serves(make_run, train, reference):
    run = make_run()
    assert train(run, "log", 9) == -signal.SIGKILL
    newest = checkpoints.complete(run.checkpoints)[-1]
    file = newest / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckFailed, match=f"broken-checkpoint.*{newest.name}"):
        checkpoints.latest(run.checkpoints)
    for part in newest.iterdir():
        part.unlink()
    newest.rmdir()
    assert train(run) == 0
    assert_same(run, reference)
