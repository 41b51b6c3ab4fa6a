"""Few-shot runs over folders of pictures: SMAT, dense meta-tuning, LoRA and nothing at all; resumed, and on two."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.artifacts import adapter
from peftcli.artifacts.remeasure import remeasure
from peftcli.artifacts.tuned import open_tuned
from peftcli.config.errors import CheckFailed
from peftcli.methods.frozen.settings import Settings as Frozen
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.methods.smat import maths
from peftcli.methods.smat.settings import Settings as Smat
from peftcli.training import checkpoints
from peftcli.training.run import run
from peftcli.training.signals import StopRequest
from tests import few_shot, pictures
from tests.training.test_resume import assert_same

SMAT = Smat(experts=2, sparsity=0.5)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("domains")
    found = {name: few_shot.make_domain(folder / name, 12, 6, seed) for seed, name in enumerate(("one", "two"))}
    found["far"] = few_shot.make_domain(folder / "far", 5, 6, 9)
    return found | {kind: pictures.make_checkpoint(folder / kind, kind) for kind in ("vit", "resnet")}


@pytest.fixture
def make(places, tmp_path):
    def of(kind: str = "vit", **more):
        domains = {name: few_shot.domain(places[name], held_out=name == "far") for name in ("one", "two", "far")}
        return few_shot.make_run(places[kind], domains, tmp_path / "runs", **more)

    return of


@pytest.mark.parametrize(
    ("kind", "method"),
    [("vit", SMAT), ("resnet", SMAT), ("vit", Full()), ("vit", Lora(r=2, targets=["all"])), ("vit", Frozen())],
    ids=lambda one: one if isinstance(one, str) else one.name,
)
def test_a_run_is_measured_by_domain_and_found_again(make, kind, method) -> None:
    folder = make(kind, method=method)
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    rows = {row["name"]: row["metrics"] for row in report["quality"]["rows"]}
    assert rows["untouched base"].keys() == rows["tuned"].keys() >= {
        "accuracy", "loss", "accuracy_in_distribution", "accuracy_out_of_distribution", "accuracy_one", "accuracy_far",
    }  # fmt: skip
    assert (rows["tuned"] == rows["untouched base"]) == (method.name == "frozen")
    assert report["quality"]["rows_measured"] == 15
    assert remeasure(open_tuned(folder.path), [])["difference"] == dict.fromkeys(rows["tuned"], 0.0)
    assert "could not be drawn" not in folder.page.read_text()


def test_sparsity_counted_from_the_file_is_what_was_asked(make) -> None:
    folder = make(method=Smat(experts=3, sparsity=0.8))
    report = run(folder.path, quiet=True)
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    (logits,) = [value for name, value in saved.items() if "smat_logits" in name]
    tuner = open_tuned(folder.path).model.base_model
    assert tuner.state.layouts["default"].entries == len(logits)
    zeros = maths.sparsity(maths.mask(logits), tuner.counts())
    assert (zeros >= 0.8).all()
    last = [row for row in folder.metrics() if "sparsity_least" in row][-1]
    assert last["sparsity_least"] == pytest.approx(float(zeros.min()), abs=1e-6)
    assert last["sparsity_union"] < last["sparsity_least"]
    assert [figure["title"] for figure in report["figures"]][-2:] == ["Overlap of the experts", "Sparsity"]


def test_a_killed_run_resumes_bit_for_bit(make, train) -> None:
    more = {"method": Smat(experts=2, sparsity=0.5, settle=0.4, stochastic=True), "training": {"save_every": 1}}
    whole, cut = make(**more), make(**more)
    assert train(whole) == 0
    for at, stage in ((4, 0), (8, 1)):
        assert train(cut, "log", at) == -signal.SIGKILL
        progress = checkpoints.latest(cut.checkpoints).progress
        assert progress.stage == stage
    assert train(cut) == 0
    assert_same(cut, whole)


def test_a_request_to_stop_is_heard_while_the_base_looks_at_all_rows(make, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    folder = make()
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        report = run(folder.path, quiet=True)
    assert (report["run"]["stopped_by"], folder.status) == ("SIGTERM", "stopped")
    assert checkpoints.latest(folder.checkpoints) is None
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert run(folder.path, quiet=True)["run"]["status"] == "done"


def test_what_was_frozen_and_what_was_kept(make, places) -> None:
    folder = make(training={"keep_best": False, "save_every": 1})
    run(folder.path, quiet=True)
    saved = checkpoints.load(checkpoints.complete(folder.checkpoints)[-1]).trained
    kinds = {name.split(".smat_")[1].split(".")[0] for name in saved}
    assert kinds == {"delta", "logits", "multipliers", "router"}
    stored = load_file(folder.adapter / "adapter_model.safetensors")
    assert {name.split(".smat_")[1].split(".")[0] for name in stored} == kinds
    assert open_tuned(folder.path).forced_base == []


def test_an_adapter_on_another_backbone_is_refused(make) -> None:
    folder = make(training={"max_steps": 2})
    run(folder.path, quiet=True)
    for kind in ("vit", "resnet"):
        with pytest.raises(CheckFailed, match=r"base-mismatch|adapter-keys"):
            adapter.load(few_shot.headless(kind, torch.float32).model, folder.adapter)


def _start(folder) -> None:
    from peftcli.config import frozen
    from peftcli.launch import processes

    processes.start(folder.path, frozen.load(folder.config).launch, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
def test_two_processes_follow_the_curve_of_one(make, experts) -> None:
    """At so high a temperature the draw of the experts says nothing, so that both compute the same up to the order of
    additions; the router learns nothing then that could be compared."""
    curves, weights = [], []
    for count in (1, 2):
        method = Smat(experts=experts, sparsity=0.5, router_temperature=(1e6, 1e6))
        folder = make(launch={"processes": count}, method=method)
        _start(folder)
        curves.append([row["loss"] for row in folder.metrics() if "loss" in row])
        weights.append(load_file(folder.adapter / "adapter_model.safetensors"))
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    # Together: AdamW makes whole steps of the rounding where a gradient is zero, as that of a key's bias.
    one, two = (torch.cat([w[name].flatten() for name in sorted(w) if "smat_router" not in name]) for w in weights)
    assert (two - one).norm() < 0.01 * one.norm()


def _telling_worker(run: str, count: int, quiet: bool) -> None:
    """A worker that leaves what it trained beside the run, by its number."""
    from peftcli.training import loop
    from peftcli.training.run import run as train

    keep = loop._keep_best

    def tell(job, progress) -> None:
        trained = {name: value.detach().contiguous() for name, value in job.model.named_parameters() if "smat_" in name}
        save_file(trained, Path(run) / f"rank{job.accelerator.process_index}.safetensors")
        keep(job, progress)

    loop._keep_best = tell
    train(Path(run), quiet=quiet)


@pytest.mark.slow
def test_two_processes_have_the_same_weights_bit_for_bit(make, monkeypatch) -> None:
    """Each draws its own noise and sees its own tasks; what both learn is one thing."""
    from peftcli.launch import processes

    monkeypatch.setattr(processes, "worker", _telling_worker)
    folder = make(launch={"processes": 2}, method=Smat(experts=3, sparsity=0.5, stochastic=True))
    _start(folder)
    first, second = (load_file(folder.path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert {name.split(".smat_")[1].split(".")[0] for name in first} == {"delta", "logits", "multipliers", "router"}
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert any(value.any() for name, value in first.items() if "delta" in name)
