"""SDT through whole runs: planted selections, what stays as it was, both stages' logs, bfloat16, kill and resume."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.artifacts.export import export
from peftcli.artifacts.run_folder import RunFolder
from peftcli.methods.sdt.settings import Settings as Sdt
from peftcli.training import checkpoints
from tests.runs import make_run
from tests.training.test_resume import assert_same

WARMED = {"selector": "magnitude", "warmup": 3, "channels": "auto", "states": "auto"}
KILLED = {"method": Sdt(**WARMED, pruned=2, dropout=0.1), "training": {"eval_every": 2, "save_every": 1}}
PLANTED = {"channels": [3, 17, 40], "states": [1, 3]}


def go(folder: RunFolder) -> dict:
    from accelerate.state import AcceleratorState

    from peftcli.training.run import run

    AcceleratorState._reset_state(reset_partial_state=True)  # another precision in the same process
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    return report


@pytest.fixture(scope="session")
def planted_folder(mamba_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mamba in which all channels but three are silent, and two of the four states are never read."""
    folder = tmp_path_factory.mktemp("planted") / "mamba"
    shutil.copytree(mamba_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    silent = [d for d in range(64) if d not in PLANTED["channels"]]
    for name, tensor in tensors.items():
        if name.endswith("out_proj.weight"):
            tensor[:, silent] = 0
        if name.endswith("x_proj.weight"):
            tensor[-8:, silent] = 0
            tensor[[-4, -2]] = 0  # what reads states 0 and 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("selector", ["magnitude", "abar", "taylor"])
def test_a_run_finds_what_was_planted(planted_folder, rows, tmp_path, selector: str) -> None:
    method = Sdt(selector=selector, channels=3, states=2, warmup=3, lora_targets=[])
    folder = make_run(planted_folder, rows, tmp_path, method=method)
    report = go(folder)
    for name, tensor in load_file(folder.adapter / "adapter_model.safetensors").items():
        if "sdt_channels" in name:
            assert tensor.tolist() == PLANTED["channels"]
        if "sdt_states" in name:
            assert tensor.tolist() == [PLANTED["states"]] * 3
    [note] = [note for note in report["data"]["notes"] if "selected" in note]
    assert "3 of 64 channels and 2 of 4 states in each of 2 layers" in note
    assert "hold 100% to 100%" in note


def test_all_but_the_chosen_entries_keep_their_bits_under_weight_decay(
    make_mamba_run: Callable, mamba_folder, tmp_path
) -> None:
    folder = make_mamba_run(method=Sdt(channels=4, states=2), optim={"weight_decay": 0.3})
    go(folder)
    export(folder.path, tmp_path / "merged")
    before = load_file(mamba_folder / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    moved = {name: after[name] != tensor for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert {name.split("mixer.")[1] for name in moved} == {"A_log", "x_proj.weight", "out_proj.weight"}
    for layer in (0, 1):
        place = f"backbone.layers.{layer}.mixer"
        channels_K, states_KS = (saved[f"base_model.model.{place}.sdt_{k}"].long() for k in ("channels", "states"))
        chosen_DN = torch.zeros(64, 4, dtype=torch.bool)
        chosen_DN[channels_K[:, None], states_KS] = True
        assert torch.equal(moved[f"{place}.A_log"], chosen_DN)
        columns_PD = torch.zeros(10, 64, dtype=torch.bool)
        columns_PD[-8:, channels_K] = True
        assert torch.equal(moved[f"{place}.x_proj.weight"], columns_PD)


def test_the_warm_up_is_a_stage_of_its_own(make_mamba_run: Callable) -> None:
    folder = make_mamba_run(method=Sdt(**WARMED), training={"eval_every": 1, "keep_best": False})
    report = go(folder)
    stages = [row["stage"] for row in folder.metrics() if "loss" in row]
    assert stages == ["warm-up"] * 3 + ["train"] * 5
    assert [row["step"] for row in folder.metrics() if "validation" in row] == [4, 5, 6, 7, 8]
    last = checkpoints.latest(folder.checkpoints)
    assert {int(t) for name, t in last.optimiser.items() if name.startswith("step/")} == {5}  # begun anew
    assert not any("sdt_warmup" in name for name in [*last.trained, *last.optimiser])
    assert not any("sdt_warmup" in name for name in load_file(folder.adapter / "adapter_model.safetensors"))
    assert [figure["title"] for figure in report["figures"]] == [
        "Selection scores of the channels",
        "Chosen channels by layer",
    ]
    page = folder.page.read_text()
    assert "Chosen channels by layer" in page
    assert "selected (magnitude)" in page
    assert "could not be drawn" not in page


def test_the_best_checkpoint_brings_its_selection(make_mamba_run: Callable) -> None:
    folder = make_mamba_run(
        method=Sdt(**WARMED), training={"max_steps": 14, "eval_every": 1, "early_stopping": 2, "keep_checkpoints": 1},
        optim={"lr": 1.0, "schedule": "constant"}, task={"best_metric": "loss"},
    )  # fmt: skip
    report = go(folder)
    assert report["run"]["stopped_early"]
    best = checkpoints.load(checkpoints.folder_of(folder.checkpoints, report["run"]["steps"] - 2))
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    kept = {name.replace(".default", ""): tensor for name, tensor in best.trained.items()}
    assert kept.keys() < saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())


def test_a_half_precision_base_stays_stable(make_mamba_run: Callable) -> None:
    half = {"training": {"precision": "bf16"}, "model": {"dtype": "bfloat16"}}
    folder = make_mamba_run(method=Sdt(**WARMED, lora_targets=["ssm.in", "ssm.out"]), **half)
    go(folder)
    from peftcli.artifacts.tuned import open_tuned
    from peftcli.methods.sdt.tuner import layers

    for _, layer in layers(open_tuned(folder.path).model):
        A_log_DN = layer.base_layer.A_log + layer.changes("default")["A_log"]
        assert A_log_DN.dtype == torch.float32
        assert (-A_log_DN.exp() < 0).all()
    assert all(tensor.isfinite().all() for tensor in load_file(folder.adapter / "adapter_model.safetensors").values())


@pytest.fixture(scope="module")
def whole(mamba_folder: Path, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that is killed below, undisturbed."""
    folder = make_run(mamba_folder, rows, tmp_path_factory.mktemp("whole"), **KILLED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        go(folder)
    return folder


@pytest.mark.parametrize(
    ("event", "at", "step", "stage"),
    [
        pytest.param("log", 3, 2, 0, id="inside the warm-up"),
        pytest.param("stage", 2, 3, 0, id="at the warm-up's end, after the selection"),
        pytest.param("log", 6, 4, 1, id="inside the training"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(make_mamba_run, whole, train, event, at, step, stage) -> None:
    run = make_mamba_run(**KILLED)
    assert train(run, event, at) == -signal.SIGKILL
    progress = checkpoints.latest(run.checkpoints).progress
    assert (progress.step, progress.stage) == (step, stage)
    resumed = go(run)
    assert_same(run, whole)
    assert resumed["figures"] == whole.read_report()["figures"]
    assert resumed["data"]["notes"] == whole.read_report()["data"]["notes"]
