"""What the figures of the sparse adapter's evidence rest on: AUROC and its intervals, few and wrong labels, tables."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import evidence_scores
import evidence_sparse
import numpy as np
import pytest
from evidence_scores import KEPT_BACK, Few, auroc, difference, drawn, flipped, pairs, ranked, scored
from sklearn.metrics import roc_auc_score

from peftcli.data.rows import Rows
from peftcli.tasks.images.gallery import Gallery
from peftcli.training.prepare import Material

TRUTH = np.array([1] * 40 + [0] * 60)


def arm(lead: float, seeds: int = 5, seed: int = 0) -> np.ndarray:
    """Scores [S, R] of runs that share the difficulty of a row."""
    generator = np.random.default_rng(seed)
    hard_R = np.random.default_rng(9).normal(size=len(TRUTH))
    return hard_R + lead * TRUTH + 0.3 * generator.normal(size=(seeds, len(TRUTH)))


def test_auroc_is_that_of_scikit_learn_with_equal_scores_too() -> None:
    scores = arm(0.7).round(0)
    for one in scores:
        assert auroc(one, TRUTH) == pytest.approx(roc_auc_score(TRUTH, one), abs=1e-12)
    runs = [{"scores": one.tolist(), "truth": TRUTH.tolist()} for one in scores]
    assert pairs(runs).mean() == pytest.approx(np.mean([roc_auc_score(TRUTH, one) for one in scores]))


def test_an_arm_does_not_differ_from_itself_and_a_lead_is_seen() -> None:
    ours, theirs = ranked(arm(1.2), TRUTH), ranked(arm(0.5, seed=1), TRUTH)
    assert difference(ours, ours) == (0, 0, 0)
    gap, low, high = difference(ours, theirs)
    assert gap == pytest.approx(ours.mean() - theirs.mean())
    assert 0 < low < gap < high
    assert difference(theirs, ours) == pytest.approx((-gap, -high, -low))


def test_the_interval_is_that_of_drawing_seeds_and_rows_by_hand() -> None:
    ours, theirs = arm(0.8), arm(0.7, seed=1)
    generator, found = np.random.default_rng(3), []
    yes, no = np.flatnonzero(TRUTH), np.flatnonzero(TRUTH == 0)
    for _ in range(2000):
        rows = np.concatenate([generator.choice(yes, len(yes)), generator.choice(no, len(no))])
        means = [
            roc_auc_score(TRUTH[rows], ours[s, rows]) - roc_auc_score(TRUTH[rows], theirs[s, rows])
            for s in generator.choice(5, 5)
        ]
        found.append(np.mean(means))
    _, low, high = difference(ranked(ours, TRUTH), ranked(theirs, TRUTH))
    assert (low, high) == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.004)


def test_wrong_labels_are_so_many_of_each_class() -> None:
    labels = np.array([0] * 30 + [1] * 50)
    turned = flipped(labels, 0.1, np.random.default_rng(0))
    assert [(turned != labels)[labels == k].sum() for k in (0, 1)] == [3, 5]
    assert (flipped(labels, 0.0, np.random.default_rng(0)) == labels).all()
    assert (labels == [0] * 30 + [1] * 50).all()


def material() -> Material:
    rows = [{"row": i, "name": f"{i}.png", "labels": [int(i % 3 == 0)]} for i in range(90)]
    whole = Gallery(Rows.from_list(rows), [1] * 90, {"rows": 90}, [], list(range(0, 180, 2)))
    return Material(None, None, None, whole, whole, whole)


def test_few_labels_are_drawn_by_class_and_a_quarter_is_kept_back() -> None:
    base = material()
    clean, wrong = drawn(base, Few(16, 0.0, 3)), drawn(base, Few(16, 0.25, 3))
    other = drawn(base, Few(16, 0.0, 4))
    assert clean.test is base.test
    assert KEPT_BACK == 0.25
    for part, count in ((clean.train, 24), (clean.validation, 8)):
        labels = [labels[0] for labels in part.rows["labels"]]
        assert (len(part), sum(labels)) == (count, count // 2)
        assert labels == [int(row % 3 == 0) for row in part.rows["row"]]
        assert part.kept == [2 * row for row in part.rows["row"]]
    assert not set(clean.train.rows["row"]) & set(clean.validation.rows["row"])
    assert wrong.train.rows["row"] == clean.train.rows["row"] != other.train.rows["row"]
    turned = sum(
        ours != theirs
        for split in ("train", "validation")
        for ours, theirs in zip(getattr(wrong, split).rows["labels"], getattr(clean, split).rows["labels"], strict=True)
    )
    assert turned == 8


@pytest.mark.samples
def test_scores_are_the_same_without_what_is_computed_once(tmp_path: Path, monkeypatch) -> None:
    bench = evidence_sparse.Bench(tmp_path, full=False)
    recipe, overrides, few, measured = bench.job("resnet", evidence_sparse.UNITS, 3e-3, 0, "16, 10% wrong")
    short = (recipe, [*overrides, "training.max_steps=10"], few, measured)
    once = scored(*short)
    monkeypatch.setattr(evidence_scores, "_entered", nullcontext)
    whole = scored(*short)
    assert once["scores"] == whole["scores"]
    assert once["train"] == whole["train"]


def test_every_run_stands_in_the_tables(tmp_path: Path) -> None:
    bench = evidence_sparse.Bench(tmp_path, full=False)
    jobs = {}
    for base in evidence_sparse.BASES:
        jobs |= bench.grid(base)
        for key in bench.grid(base):
            bench.store.results[key] = {"validation": float("/0.003/" in key)}
        rates = bench.rates(base)
        assert set(rates.values()) == {0.003}
        jobs |= bench.jobs(base, "all", list(evidence_sparse.ARMS), rates)
        jobs |= bench.jobs(base, "shift", list(evidence_sparse.ARMS), rates)
        for case in evidence_sparse.FEW:
            jobs |= bench.jobs(base, case, evidence_sparse.FEW_ARMS, rates)
    for place, key in enumerate(jobs):
        sparse = evidence_sparse.UNITS in key or evidence_sparse.WEIGHTS in key
        bench.store.results[key] = {
            "scores": arm(0.8, 1, place)[0].tolist(), "truth": TRUTH.tolist(), "validation": float("/0.003/" in key),
            "train": 1.0, "trained": 9, "nonzero": 20 if sparse else 100, "bytes": 200 if sparse else 1000, "notes": [],
        }  # fmt: skip
    told = evidence_sparse.report(bench)
    assert told.count("| 80% | 0 | 5.0 |") == 8
    assert "The guard took pruning back in 0 of 30 runs." in told
    assert "file 5.0 times smaller, the 4 that were asked for" in told
    assert "{" not in told


@pytest.mark.parametrize(
    ("low", "high", "told"), [(-0.009, 0.02, "not worse"), (-0.02, 0.0, "not shown"), (-0.04, -0.011, "worse")]
)
def test_a_margin_of_one_point(low: float, high: float, told: str) -> None:
    assert evidence_sparse._verdict(low, high) == told
