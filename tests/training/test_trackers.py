"""Metrics reach a tracker too, or the missing package is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftcli.config import frozen
from peftcli.config.errors import UserError
from peftcli.training.run import run as train_here


def tracked(make_run, name: str):
    run = make_run(training={"max_steps": 3, "eval_every": 3})
    config = frozen.load(run.config)
    frozen.save(replace(config, tracker=replace(config.tracker, name=name)), run.config)
    return run


def test_tensorboard_has_the_rows_of_the_log(make_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tracked(make_run, "tensorboard")
    train_here(run.path, quiet=True)
    read = EventAccumulator(str(run.path / "peftcli"))
    read.Reload()
    logged = [row["loss"] for row in run.metrics() if "loss" in row]
    assert [point.value for point in read.Scalars("train/loss")] == pytest.approx(logged)
    assert [point.step for point in read.Scalars("validation/accuracy")] == [3]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(make_run, recwarn):
    run = tracked(make_run, "mlflow")
    with pytest.raises(UserError, match=r"tracker 'mlflow' is not installed\n.*peftcli\[mlflow\]"):
        train_here(run.path, quiet=True)
    assert not [w for w in recwarn if "log_with" in str(w.message)]
