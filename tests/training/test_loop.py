"""What a step computes does not depend on how it is cut up; what cannot go on says so and loses nothing."""

from __future__ import annotations

import json

import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed
from peftcli.launch import processes
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.training import checkpoints
from peftcli.training.run import run as train_here

PLAIN = Lora(r=2, dropout=0.0)


def losses(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


def norms(run: RunFolder) -> list[float]:
    return [row["grad_norm"] for row in run.metrics() if "grad_norm" in row]


def test_micro_batches_do_not_change_the_curve(make_run):
    whole, parts = make_run(method=PLAIN), make_run(method=PLAIN, training={"micro_batch_size": 2})
    train_here(whole.path, quiet=True)
    train_here(parts.path, quiet=True)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    assert norms(parts) == pytest.approx(norms(whole), rel=1e-3)


def test_gradient_checkpointing_does_not_change_the_curve(make_run):
    plain, saving = make_run(), make_run(training={"gradient_checkpointing": True})
    train_here(plain.path, quiet=True)
    train_here(saving.path, quiet=True)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-6)


def test_two_processes_follow_the_curve_of_one(make_run):
    settings = {"batch_size": 7, "max_steps": 6, "eval_every": 3}  # 7 rows: an unequal share, of unequal lengths
    one, two = (
        make_run(method=PLAIN, training=settings),
        make_run(method=PLAIN, training=settings, launch={"processes": 2}),
    )
    train_here(one.path, quiet=True)
    from peftcli.config import frozen

    report = processes.start(two.path, frozen.load(two.config).launch, quiet=True)
    assert report["run"]["status"] == "done"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert norms(two) == pytest.approx(norms(one), rel=1e-3)
    measured = [[row["validation"]["loss"] for row in run.metrics() if "validation" in row] for run in (one, two)]
    assert measured[1] == pytest.approx(measured[0], rel=1e-3)
    assert [r["tokens"] for r in two.metrics() if "tokens" in r] == [
        r["tokens"] for r in one.metrics() if "tokens" in r
    ]


def test_a_failure_in_a_worker_reaches_the_parent_with_its_name(make_run):
    run = make_run(launch={"processes": 2}, optim={"lr": 3e38, "clip_norm": None, "warmup_share": 0.0})
    from peftcli.config import frozen

    with pytest.raises(CheckFailed, match="non-finite-loss"):
        processes.start(run.path, frozen.load(run.config).launch, quiet=True)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(make_run):
    run = make_run(
        optim={"lr": 3e38, "clip_norm": None, "warmup_share": 0.0, "schedule": "constant"},
        training={"save_every": 1},
    )
    with pytest.raises(CheckFailed, match="non-finite-loss") as failure:
        train_here(run.path, quiet=True)
    assert "optim.lr" in failure.value.hint
    assert run.status == "failed"
    assert checkpoints.latest(run.checkpoints).progress.step >= 1
    assert "non-finite-loss" in run.page.read_text()


def test_early_stopping_ends_with_the_best_checkpoint(make_run):
    run = make_run(
        training={"max_steps": 30, "eval_every": 1, "early_stopping": 2, "keep_checkpoints": 1},
        optim={"lr": 0.5, "schedule": "constant"},
        task={"best_metric": "loss"},
    )
    report = train_here(run.path, quiet=True)
    measured = [row["validation"]["loss"] for row in run.metrics() if "validation" in row]
    assert report["run"]["stopped_early"]
    assert len(measured) < 30
    assert min(measured) == measured[-3]
    held = [row for row in run.metrics() if "validation" in row]
    assert held[-1]["step"] == report["run"]["steps"]


def test_frozen_tensors_and_the_start_are_checked_and_said(make_run):
    run = make_run()
    report = train_here(run.path, quiet=True)
    passed = {row["name"] for row in report["checks"] if row["passed"]}
    assert {"identity-start", "dead-adapter", "frozen-moved", "no-trainable-tokens"} <= passed


def test_streamed_rows_train_and_resume_at_their_place(make_run, train):
    def make():
        return make_run(data={"streaming": True})

    reference, run = make(), make()
    assert train(reference) == 0
    assert train(run, "log", 6) != 0
    assert train(run) == 0
    assert losses(run) == losses(reference)
    assert (
        next(run.adapter.glob("*.safetensors")).read_bytes()
        == next(reference.adapter.glob("*.safetensors")).read_bytes()
    )


def test_a_stranger_loads_and_merges_the_adapter_with_plain_peft(make_run, checkpoint):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peftcli

    run = make_run()
    train_here(run.path, quiet=True)
    peftcli.register_with_peft()
    words = AutoTokenizer.from_pretrained(checkpoint)
    batch = words("the film was good", return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = base(**batch).logits
    model = PeftModel.from_pretrained(base, run.adapter)
    tuned = model(**batch).logits
    merged = model.merge_and_unload()(**batch).logits
    assert not torch.allclose(before, tuned, atol=1e-3)
    assert torch.allclose(tuned, merged, atol=1e-4)
    assert json.loads((run.adapter / "lineage.json").read_text())["base"]["tensors"]
