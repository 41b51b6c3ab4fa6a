"""What a step computes does not depend on how it is cut up; what cannot go on says so and loses nothing."""

from __future__ import annotations

import json

import pytest
import torch

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import CheckFailed, UserError
from peftcli.launch import processes
from peftcli.methods.full.settings import Settings as Full
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


def adapter_bits(run: RunFolder) -> dict:
    from safetensors.torch import load_file

    found = load_file(next(run.adapter.glob("*.safetensors")))
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}


def checkpoint_bits(run: RunFolder, step: int) -> dict:
    found = checkpoints.load(checkpoints.folder_of(run.checkpoints, step)).trained
    return {n.removeprefix("base_model.model.").replace(".default", ""): t for n, t in found.items()}


OVERSHOOTING = {
    "training": {"max_steps": 30, "eval_every": 1, "early_stopping": 2, "keep_checkpoints": 1},
    "optim": {"lr": 0.5, "schedule": "constant"},
    "task": {"best_metric": "loss"},
}


def test_early_stopping_ends_with_the_weights_of_the_best_checkpoint(make_run):
    run = make_run(**OVERSHOOTING)
    report = train_here(run.path, quiet=True)
    measured = {row["step"]: row["validation"]["loss"] for row in run.metrics() if "validation" in row}
    best = min(measured, key=measured.get)
    assert report["run"]["stopped_early"]
    assert report["run"]["steps"] == best + 2 < 30
    kept, saved = adapter_bits(run), checkpoint_bits(run, best)
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_a_run_killed_after_it_stopped_early_keeps_what_it_learnt(make_run, train):
    settings = {**OVERSHOOTING, "training": {**OVERSHOOTING["training"], "keep_best": False}}
    whole, killed = make_run(**settings), make_run(**settings)
    assert train(whole) == 0
    assert train(killed, "finish", 1) < 0
    assert checkpoints.latest(killed.checkpoints).progress.stopped_early
    assert train(killed) == 0
    kept, saved = adapter_bits(killed), adapter_bits(whole)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)
    assert any(tensor.any() for name, tensor in kept.items() if "lora_B" in name)


def test_an_early_stop_ends_its_stage_and_the_best_is_the_last_stages(make_run):
    run = make_run(
        method=Full(head_first=0.5),
        task={"head": "linear", "best_metric": "loss"},
        training={"max_steps": 12, "eval_every": 1, "early_stopping": 1},
        optim={"lr": 1e-3, "schedule": "constant"},
    )
    train_here(run.path, quiet=True)
    rows = [row for row in run.metrics() if "validation" in row]
    last = [row for row in rows if row["stage"] == "all"]
    assert last, "the second stage was left out"
    best = min(last, key=lambda row: row["validation"]["loss"])["step"]
    progress = checkpoints.latest(run.checkpoints).progress
    assert progress.best_step == best


def test_a_run_without_measurements_still_leaves_checkpoints_on_the_way(make_run, train):
    run = make_run(data={"validation_share": 0.0}, training={"max_steps": 20, "eval_every": "end"})
    assert train(run, "log", 12) < 0
    assert checkpoints.latest(run.checkpoints).progress.step == 10


def test_a_base_that_changed_between_two_parts_of_a_run_is_refused(make_run, train, checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    base = shutil.copytree(checkpoint, tmp_path / "base")
    run = make_run(model={"name": str(base)})
    assert train(run, "log", 7) < 0
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="base-mismatch"):
        train_here(run.path, quiet=True)


def test_two_trainers_do_not_share_a_run(make_run):
    from filelock import FileLock

    run = make_run()
    with FileLock(run.path / ".lock"), pytest.raises(UserError, match="another process"):
        train_here(run.path, quiet=True)


def test_rows_are_counted_once_where_a_batch_is_smaller_than_the_processes(make_run):
    from peftcli.config import frozen

    settings = {"batch_size": 3, "max_steps": 14, "eval_every": "end"}  # 40 rows: the last batch of an epoch has one
    run = make_run(method=PLAIN, training=settings, launch={"processes": 2})
    processes.start(run.path, frozen.load(run.config).launch, quiet=True)
    assert [row["rows"] for row in run.metrics() if "rows" in row] == [3] * 13 + [1]


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
