"""Settings that are left to auto: how many short runs, what they choose by, and that a resumed run has the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from peftcli.config.errors import UserError
from peftcli.methods.smat.settings import Settings
from peftcli.methods.smat.tuner import Method
from peftcli.training import trials
from peftcli.training.run import run
from tests import few_shot, pictures, together

AUTO = Settings(experts="auto", sparsity="auto", expert_choices=[1, 2], sparsity_choices=[0.3, 0.6])


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("domains")
    found = {name: few_shot.make_domain(folder / name, 12, 6, seed) for seed, name in enumerate(("one", "two"))}
    return found | {"vit": pictures.make_checkpoint(folder / "vit", "vit")}


def make(places, output: Path, **more):
    domains = {name: few_shot.domain(places[name]) for name in ("one", "two")}
    return few_shot.make_run(places["vit"], domains, output, **more)


def test_candidates_are_all_that_auto_leaves_open() -> None:
    assert Method(Settings()).candidates() == []
    found = [one.about for one in Method(AUTO).candidates()]
    assert found[0] == {"experts": 1, "sparsity": 0.6}
    assert len(found) == 4
    (only,) = {one.about["experts"] for one in Method(Settings(experts=5, sparsity="auto")).candidates()}
    assert only == 5
    assert Method(AUTO).settings.experts == 2  # by itself it takes the largest


def test_rounds_keep_a_third_and_stay_cheap() -> None:
    assert trials.rounds(1, 1000) == []
    assert trials.rounds(3, 1000) == [(3, 90)]
    assert trials.rounds(9, 1000) == [(9, 30), (3, 90)]
    for count in (3, 9):
        assert sum(n * steps for n, steps in trials.rounds(count, 1000)) <= 0.6 * 1000


def test_the_best_candidate_by_validation_is_trained_and_stays_chosen(places, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trials, "LEAST", 2)
    folder = make(places, tmp_path, method=AUTO)
    report = run(folder.path, quiet=True)
    tried = report["trials"]
    assert [row["steps"] for row in tried] == [2, 2, 2, 2, 6, 6]
    last = [row for row in tried if row["steps"] == 6]
    best = max(last, key=lambda row: row["value"])["about"]
    saved = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert {name: saved[name] for name in best} == best
    assert not (folder.path / "trials").exists()
    assert report["figures"][0]["x"] == ["1, 0.6", "1, 0.3", "2, 0.6", "2, 0.3"]
    # What was tried stands in the folder: a resumed run tries nothing again, whatever it would find now.
    turned = [{**row, "value": float(row["about"] == {"experts": 2, "sparsity": 0.3})} for row in tried]
    again = make(places, tmp_path / "again", method=AUTO)
    second = [{**row, "about": {"experts": 2, "sparsity": 0.3}, "steps": 6, "value": 1.0} for row in tried[:1]]
    second += [{**row, "steps": 6} for row in turned[:1]]
    (again.path / "trials.json").write_text(json.dumps([*turned[:4], *second]))
    chosen = run(again.path, quiet=True)
    assert chosen["trials"] == [*turned[:4], *second]
    saved = json.loads((again.adapter / "adapter_config.json").read_text())
    assert (saved["experts"], saved["sparsity"]) == (2, 0.3)


@pytest.mark.slow
def test_two_processes_choose_the_same(places, tmp_path) -> None:
    few = Settings(experts="auto", sparsity=0.5, expert_choices=[1, 2])
    folder = make(places, tmp_path, method=few, launch={"processes": 2, "timeout_minutes": 2})
    together.train([folder], tmp_path / "meeting", tmp_path / "cache")
    (one, about), (two, _) = (together.held(folder, rank) for rank in (0, 1))
    assert about["world"] == 2
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    tried = folder.read_report()["trials"]
    assert [row["about"]["experts"] for row in tried] == [1, 2]
    best = max(tried, key=lambda row: row["value"])["about"]
    assert json.loads((folder.adapter / "adapter_config.json").read_text())["experts"] == best["experts"]
    assert not (folder.path / "trials").exists()


def test_without_a_validation_split_auto_is_refused(places, tmp_path) -> None:
    folder = make(places, tmp_path, method=AUTO, data={"validation_share": 0.0})
    with pytest.raises(UserError, match="auto is chosen by the validation split, and there is none"):
        run(folder.path, quiet=True)
