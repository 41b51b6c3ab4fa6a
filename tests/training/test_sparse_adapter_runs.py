"""Sparse adapters through whole runs: kill and resume in every stage, the page, the guard's measurements, refusals."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from peftcli.artifacts import adapter
from peftcli.artifacts.export import export
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed, UserError
from peftcli.launch import processes
from peftcli.methods.sparse_adapter.settings import Settings
from peftcli.testing import tiny
from peftcli.training import checkpoints
from tests.runs import make_run
from tests.training.test_resume import assert_same

METHOD = Settings(r=4, structure="weight", sparsity=0.7, few=0.25, final=0.25, guard=1.0, importance="fisher")
KILLED = {"method": METHOD, "training": {"max_steps": 8, "eval_every": 2, "save_every": 1}}


def go(folder: RunFolder) -> dict:
    from peftcli.training.run import run

    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    return report


@pytest.fixture(scope="module")
def whole(checkpoint: Path, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that is killed below, undisturbed."""
    folder = make_run(checkpoint, rows, tmp_path_factory.mktemp("whole"), **KILLED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        go(folder)
    return folder


@pytest.mark.parametrize(
    ("at", "step", "stage"),
    [
        pytest.param(8, 4, 1, id="inside the stage that prunes"),
        pytest.param(13, 7, 2, id="inside the last stage"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(make_run: Callable, train: Callable, whole, at, step, stage) -> None:
    run = make_run(**KILLED)
    assert train(run, "log", at) == -signal.SIGKILL
    progress = checkpoints.latest(run.checkpoints).progress
    assert (progress.step, progress.stage) == (step, stage)
    resumed = go(run)
    assert_same(run, whole)
    assert resumed["figures"] == whole.read_report()["figures"]


def test_the_page_shows_what_survived_and_the_path(whole: RunFolder) -> None:
    report, page = whole.read_report(), whole.page.read_text()
    titles = [figure["title"] for figure in report["figures"]]
    assert titles == ["Units left in each module", "Weights left in each module", "Numbers of all modules", "Sparsity"]
    assert all(title in page for title in titles)
    assert "could not be drawn" not in page
    (dense, masked, compacted), (_, nonzero, same) = report["figures"][2]["y"]
    assert dense == masked == 4 * (2 * 4 * tiny.WIDTH + 4 + 4 + tiny.WIDTH) >= compacted >= nonzero == same
    path = report["figures"][3]
    assert path["y"][0][-1] == pytest.approx(0.7)
    assert path["y"][1][-1] >= 0.699
    assert [row["step"] for row in whole.metrics() if "validation" in row] == [2, 3, 4, 5, 6, 8]


def test_the_file_has_the_budget_and_fits_no_other_base(whole: RunFolder) -> None:
    stored = load_file(whole.adapter / adapter.WEIGHTS)
    values = sum(t.numel() for key, t in stored.items() if key.endswith(".values"))
    dense = sum(t.count_nonzero() for key, t in stored.items() if key.endswith(("sparse_down", "sparse_up")))
    assert 0 < values + int(dense) <= 0.3 * 4 * 2 * 4 * tiny.WIDTH + 1
    with pytest.raises(CheckFailed) as refused:
        adapter.load(tiny.llama().model.float(), whole.adapter)
    assert refused.value.check in ("base-mismatch", "adapter-keys")


def test_merging_is_refused_with_what_to_use(whole: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be merged") as refused:
        export(whole.path, tmp_path / "merged")
    assert "use the adapter itself" in str(refused.value)


def test_a_linear_one_merges(make_run: Callable, tmp_path: Path) -> None:
    run = make_run(method=replace(METHOD, activation="linear", structure="unit", sparsity=0.5))
    go(run)
    assert export(run.path, tmp_path / "merged")["merge"]["share"] < 0.01


def test_a_guard_that_nothing_passes_ends_without_pruning(make_run: Callable) -> None:
    run = make_run(
        method=replace(METHOD, guard=0.0), task={"best_metric": "loss"}, optim={"lr": 5.0, "schedule": "constant"}
    )
    report = go(run)
    [note] = [note for note in report["data"]["notes"] if "back to" in note]
    assert "method.guard=0" in note


@pytest.mark.parametrize("structure", ["unit", "weight"])
def test_two_processes_prune_the_same(make_run: Callable, structure: str) -> None:
    method = replace(METHOD, structure=structure, importance="first_order", dropout=0.0, sparsity=0.5)
    settings = {"max_steps": 8, "batch_size": 6, "eval_every": 4, "save_every": 4}
    one, two = (make_run(method=method, training=settings, launch={"processes": n}) for n in (1, 2))
    go(one)
    report = processes.start(two.path, frozen.load(two.config).launch, quiet=True)
    assert report["run"]["status"] == "done"
    # Each process prunes by itself, of gradients that are means over all: had they come to other masks, their weights
    # would differ, and with them the next losses, which are sums over both.
    losses = [[row["loss"] for row in run.metrics() if "loss" in row] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    kept = [adapter.read_config(run.adapter).units for run in (one, two)]
    assert kept[0] == kept[1]
    stored = [load_file(run.adapter / adapter.WEIGHTS) for run in (one, two)]
    assert {key: tuple(t.shape) for key, t in stored[0].items()} == {
        key: tuple(t.shape) for key, t in stored[1].items()
    }


def test_the_report_has_a_table_of_costs(whole: RunFolder) -> None:
    rows = {row["form"]: row for row in whole.read_report()["costs"]["rows"]}
    assert list(rows) == ["base", "dense", "masked", "compacted"]
    assert (
        rows["masked"]["nonzero"]
        < rows["dense"]["nonzero"]
        == rows["dense"]["parameters"] - (rows["base"]["parameters"] - rows["base"]["nonzero"])
    )
    assert rows["compacted"]["file_bytes"] == pytest.approx((whole.adapter / adapter.WEIGHTS).stat().st_size, abs=200)
    page = whole.page.read_text()
    assert "Zeros that are held save nothing but space on disk" in page
    assert '<th scope="row">compacted</th>' in page
