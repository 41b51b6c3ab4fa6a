"""Metrics against scikit-learn, torchmetrics and cases worked out by hand: ties, absent classes, certain rows."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional import classification as tm

from peftcli.tasks.images import metrics


def scores(rows: int, classes: int, seed: int = 0, coarse: bool = False):
    draw = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (rows,), generator=draw)
    logits = torch.randn(rows, classes, generator=draw) + 1.2 * torch.nn.functional.one_hot(targets, classes)
    if coarse:  # many ties
        logits = logits.round()
    return logits.log_softmax(1), targets


@pytest.mark.parametrize("coarse", [False, True])
def test_two_classes_against_scikit_learn(coarse):
    log_p, targets = scores(300, 2, coarse=coarse)
    found = metrics.single_label(log_p, targets, positive=1)
    odds = (log_p[:, 1] - log_p[:, 0]).double().numpy()
    truth = targets.numpy()
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(truth, odds), abs=1e-5)
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(truth, odds), abs=1e-5)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, odds > 0), abs=1e-5)
    assert found["f1_macro"] == pytest.approx(sk.f1_score(truth, odds > 0, average="macro"), abs=1e-5)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, odds > 0), abs=1e-5)
    assert set(found) == set(metrics.SINGLE)


def test_the_area_counts_pairs_and_ties_by_half():
    scores_N, true_N = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 1, 0, 1])
    log_p = torch.stack([1 - scores_N, scores_N], 1).log()
    pairs = [(0.4, 0.1), (0.4, 0.4), (0.8, 0.1), (0.8, 0.4)]
    expected = sum(1 if a > b else 0.5 for a, b in pairs) / 4
    assert metrics.single_label(log_p, true_N, positive=1)["auroc"] == expected == 0.875
    assert metrics.single_label(log_p, true_N, positive=0)["auroc"] == 0.875


def test_several_classes_are_means_of_one_against_the_others():
    log_p, targets = scores(400, 4, seed=1)
    found = metrics.single_label(log_p, targets)
    p = log_p.exp().double()
    each = [sk.roc_auc_score((targets == c).numpy(), p[:, c].numpy()) for c in range(4)]
    precision = [sk.average_precision_score((targets == c).numpy(), p[:, c].numpy()) for c in range(4)]
    assert found["auroc"] == pytest.approx(sum(each) / 4, abs=1e-5)
    assert found["average_precision"] == pytest.approx(sum(precision) / 4, abs=1e-5)


def test_a_class_without_rows_is_left_out():
    log_p, targets = scores(200, 4, seed=2)
    targets[targets == 3] = 0
    found = metrics.single_label(log_p, targets)
    p = log_p.exp().double()
    each = [sk.roc_auc_score((targets == c).numpy(), p[:, c].numpy()) for c in range(3)]
    assert found["auroc"] == pytest.approx(sum(each) / 3, abs=1e-5)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("positive", [0, 1, None])
def test_with_one_class_alone_there_is_no_area(positive):
    log_p, _ = scores(20, 2)
    found = metrics.single_label(log_p, torch.ones(20, dtype=torch.long), positive)
    assert set(found) == {"accuracy", "balanced_accuracy", "f1_macro", "loss", "calibration_error"}
    assert all(math.isfinite(value) for value in found.values())


def test_certain_rows_keep_their_order():
    odds = torch.tensor([20.0, 30.0, 40.0, 50.0, -1e4, 1e4], dtype=torch.float64)  # 1.0 all in single precision
    log_p = torch.stack([-odds, torch.zeros(6, dtype=torch.float64)], 1).log_softmax(1)
    truth = torch.tensor([0, 0, 1, 1, 0, 1])
    assert metrics.single_label(log_p.float(), truth, positive=1)["auroc"] == 1.0
    hopeless = torch.tensor([[-math.inf, 0.0], [0.0, -math.inf], [-1.0, -0.46]])
    assert metrics.single_label(hopeless[[0, 1, 1]], torch.tensor([1, 0, 0]), positive=1)["auroc"] == 1.0


def test_recall_at_a_false_alarm_rate_by_hand():
    # Highest first: hit, hit, alarm, hit, alarm, hit; of four true rows and five others.
    values = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 1])
    truth = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 0]).bool()
    expected = {0.0: 0.5, 0.1: 0.5, 0.2: 0.75, 0.3: 0.75, 0.4: 1.0, 1.0: 1.0}
    assert {rate: metrics.recall_at(values, truth, rate) for rate in expected} == expected
    tied = torch.tensor([5.0, 5, 5, 1])  # found together with an alarm, so not without it
    assert metrics.recall_at(tied, torch.tensor([1, 1, 0, 0]).bool(), 0.0) == 0.0
    assert metrics.recall_at(tied, torch.tensor([1, 1, 0, 0]).bool(), 0.5) == 1.0


def test_calibration_by_hand():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55, 0.55, 0.55])
    right = torch.tensor([1, 0, 1, 1, 0, 0])
    # 15 bins: 0.95 in (14/15, 1], 0.55 in (8/15, 9/15].
    found = metrics.reliability(confidence, right)
    assert [(round(b["confidence"], 3), b["accuracy"], b["rows"]) for b in found] == [(0.55, 0.5, 4), (0.95, 0.5, 2)]
    assert metrics.calibration_error(confidence, right) == pytest.approx((4 * 0.05 + 2 * 0.45) / 6, abs=1e-6)
    assert metrics.calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([1, 1])) == 0.0


@pytest.mark.parametrize("classes", [2, 5])
def test_calibration_against_torchmetrics(classes):
    log_p, targets = scores(500, classes, seed=4)
    expected = tm.multiclass_calibration_error(log_p.exp().double(), targets, num_classes=classes, n_bins=15)
    assert metrics.single_label(log_p, targets)["calibration_error"] == pytest.approx(float(expected), abs=2e-5)


def test_confusion_against_scikit_learn():
    log_p, targets = scores(200, 5, seed=5)
    guesses = log_p.argmax(1)
    assert metrics.confusion(guesses, targets, 5) == sk.confusion_matrix(targets, guesses).tolist()
    assert metrics.confusion(torch.tensor([0, 2]), torch.tensor([2, 2]), 3) == [[0, 0, 0], [0, 0, 0], [1, 0, 1]]


def test_several_labels_a_row_against_scikit_learn():
    draw = torch.Generator().manual_seed(6)
    truth = torch.rand(300, 4, generator=draw) < torch.tensor([0.5, 0.2, 0.05, 0.7])
    logits = torch.randn(300, 4, generator=draw) + 2 * truth - 1
    found = metrics.multi_label(logits, truth)
    guess, t = (logits > 0).numpy(), truth.numpy()
    assert set(found) == set(metrics.MULTI)
    assert found["accuracy"] == pytest.approx((guess == t).mean(), abs=1e-5)
    assert found["exact_match"] == pytest.approx(sk.accuracy_score(t, guess), abs=1e-5)
    assert found["f1_macro"] == pytest.approx(sk.f1_score(t, guess, average="macro"), abs=1e-5)
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(t, logits.numpy(), average="macro"), abs=1e-5)
    expected = sk.average_precision_score(t, logits.numpy(), average="macro")
    assert found["average_precision"] == pytest.approx(expected, abs=1e-5)
    balanced = sum(sk.balanced_accuracy_score(t[:, c], guess[:, c]) for c in range(4)) / 4
    assert found["balanced_accuracy"] == pytest.approx(balanced, abs=1e-5)


def test_labels_that_all_rows_or_none_have_leave_no_nan():
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -2.0, 3.0]])
    truth = torch.tensor([[1, 0, 1], [0, 0, 1]])
    found = metrics.multi_label(logits, truth)
    assert found["auroc"] == found["balanced_accuracy"] == found["f1_macro"] == found["exact_match"] == 1.0
    alone = metrics.multi_label(logits[:, 1:], truth[:, 1:])
    assert "auroc" not in alone
    assert "balanced_accuracy" not in alone
    assert all(math.isfinite(value) for value in alone.values())
