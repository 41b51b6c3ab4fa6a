"""Tying with distillation through whole runs: kill and resume in both stages, processes, the estimate."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from peftcli.config import frozen
from peftcli.launch import processes
from peftcli.methods.rowcol.settings import Distill, Settings
from peftcli.training import checkpoints
from tests.training.test_resume import assert_same

METHOD = Settings(mode="tie", distill=Distill(layerwise_steps=4))
KILLED = {"method": METHOD, "training": {"max_steps": 8, "eval_every": 2, "save_every": 1}, "optim": {"lr": 1e-3}}


def test_a_run_killed_in_either_stage_resumes_bit_for_bit(make_run, train):
    whole, run = make_run(**KILLED), make_run(**KILLED)
    assert train(whole) == 0
    for at, stage in ((3, 0), (4, 1)):
        assert train(run, "log", at) == -signal.SIGKILL
        assert checkpoints.latest(run.checkpoints).progress.stage == stage
    assert train(run) == 0
    assert_same(run, whole)
    rows = [row for row in whole.metrics() if "loss" in row]
    assert [row["stage"] for row in rows] == ["blocks"] * 4 + ["train"] * 4
    assert all(row["distil_blocks"] > 0 for row in rows)
    assert rows[0]["loss"] == pytest.approx(rows[0]["distil_blocks"])
    last = rows[-1]
    expected = 0.5 * last["distil_task"] + 0.5 * last["distil_kl"] + last["distil_blocks"]
    assert last["loss"] == pytest.approx(expected, rel=1e-5)
    assert not any("teacher" in name for name in load_file(next(whole.model.glob("*.safetensors"))))


@pytest.mark.slow
def test_micro_batches_and_processes_follow_one_curve(make_run):
    from peftcli.training.run import run

    changes = [{}, {"training": {**KILLED["training"], "micro_batch_size": 2}}, {"launch": {"processes": 2}}]
    curves = []
    for change in changes:
        folder = make_run(**{**KILLED, **change})
        if "launch" in change:
            processes.start(folder.path, frozen.load(folder.config).launch, quiet=True)
        else:
            run(folder.path, quiet=True)
        curves.append([row["loss"] for row in folder.metrics() if "loss" in row])
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], rel=1e-4)


def test_the_estimate_counts_the_teacher(make_run):
    from peftcli.training.estimate import estimate

    config = frozen.load(make_run(**KILLED).config)
    alone = replace(config, method=Settings(mode="tie", distill=Distill(weight=0.0, features=0.0)))
    with_teacher, without = (estimate(one) for one in (config, alone))
    held = sum(with_teacher.weights_by_dtype.values())
    more = with_teacher.heaviest[1].adapter - without.heaviest[1].adapter
    assert 0.8 * held <= more < held  # the layers that are tied stay without a teacher too, for the report's costs
    assert with_teacher.file_bytes == without.file_bytes
    assert with_teacher.heaviest[1].activations > without.heaviest[1].activations
