"""Which label is the defect, the score from which a picture has it, and what that promises of new pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peftcli.config.errors import UserError
from peftcli.config.schema import ImageConfig
from peftcli.data.rows import Rows
from peftcli.data.sources import Splits
from peftcli.tasks.images import alarms
from peftcli.tasks.images.alarms import Alarms
from peftcli.tasks.images.outcome import Outcome
from peftcli.tasks.images.task import ImagesTask


@pytest.mark.parametrize(
    ("asked", "labels", "expected"),
    [
        ("auto", ["bad", "good"], "bad"),
        ("auto", ["NG", "OK"], "NG"),
        ("auto", ["Not-OK", "ok"], "Not-OK"),
        ("auto", ["defective", "functional"], "defective"),
        ("auto", ["good", "scratched"], "scratched"),
        ("auto", ["faulty", "other"], "faulty"),
        ("good", ["bad", "good"], "good"),
        (None, ["bad", "good"], None),
        (None, ["a", "b", "c"], None),
    ],
)
def test_the_defect_goes_by_the_names(asked, labels, expected) -> None:
    assert alarms.positive(asked, labels) == expected


@pytest.mark.parametrize(
    ("asked", "labels", "words"),
    [
        ("auto", ["left", "right"], ("'left'", "'right'", "task.positive=left", "task.positive=right")),
        ("auto", ["bad", "broken"], ("'bad'", "'broken'")),
        ("auto", ["good", "ok"], ("'good'", "'ok'")),
        ("auto", ["dent", "good", "scratch"], ("there are 3: dent, good, scratch", "bad/scratch")),
        ("dent", ["dent", "good", "scratch"], ("needs two labels",)),
        ("bda", ["bad", "good"], ("did you mean: bad", "allowed: bad, good")),
    ],
)
def test_names_that_do_not_tell_are_asked_about(asked, labels, words) -> None:
    with pytest.raises(UserError) as caught:
        alarms.positive(asked, labels)
    for word in words:
        assert word in str(caught.value)


def test_the_guess_is_told() -> None:
    rows = Rows.from_list([{"image": None, "label": label, "row": i} for i, label in enumerate(["ng", "ok"] * 3)])
    splits = Splits(rows, None, None, "", {}, [])
    ImagesTask(ImageConfig(positive="auto")).fit(splits)
    assert splits.notes == ["'ng' is taken for the defect, 'ok' not (task.positive=ok if wrong)"]


def test_the_threshold_by_hand() -> None:
    known = Alarms("bad", (3.0, 2.0, 1.0, 0.0))  # four others: a new one is above the k-th with chance k / 5
    assert [known.threshold(rate) for rate in (0.0, 0.1, 0.2, 0.39, 0.4, 0.8, 0.99)] == [3, 3, 3, 3, 2, 0, 0]
    assert [known.expected(rate) for rate in (0.0, 0.2, 0.4, 0.99)] == [0.2, 0.2, 0.4, 0.8]
    assert known.probability(0.4) == pytest.approx(1 / (1 + np.exp(-2)))
    assert Alarms("bad").threshold(0.05) is None
    assert Alarms("bad", (-800.0,)).probability(0.5) == pytest.approx(0)


@pytest.mark.parametrize(("count", "rate"), [(24, 0.05), (99, 0.05), (100, 0.1), (19, 0.05)])
def test_new_sound_pictures_raise_as_many_false_alarms_as_promised(count, rate) -> None:
    """Over many draws of validation pictures, whatever the scores' distribution."""
    dice = np.random.default_rng(0)
    scores = dice.exponential(size=(4000, count + 1)) ** 3
    raised = [new > Alarms("bad", tuple(sorted(before, reverse=True))).threshold(rate) for *before, new in scores]
    expected = Alarms("bad", tuple(range(count))).expected(rate)
    assert expected <= max(rate, 1 / (count + 1))
    assert np.mean(raised) == pytest.approx(expected, abs=4 * np.sqrt(expected / len(scores)))


def test_answers_metrics_and_confusions_follow_the_threshold() -> None:
    odds_N = torch.tensor([4.0, 1.0, 2.0, -1.0, 0.5])
    logits_NK = torch.stack([odds_N, torch.zeros(5)], 1)  # bad, good
    truth = [[0], [0], [1], [1], [1]]
    halfway, strict = (Outcome(logits_NK, ["bad", "good"], 0, False, threshold=t) for t in (None, 2.0))
    assert [row["predicted"] for row in halfway.answers()] == ["bad", "bad", "bad", "good", "bad"]
    assert [row["predicted"] for row in strict.answers()] == ["bad", "good", "good", "good", "good"]  # above, not at
    assert (halfway.measure(truth)["accuracy"], strict.measure(truth)["accuracy"]) == (0.6, 0.8)
    for metric in ("auroc", "average_precision", "loss", "recall_at_false_alarms", "calibration_error"):
        assert halfway.measure(truth)[metric] == strict.measure(truth)[metric], metric
    assert strict.drawn(truth)["confusion"]["counts"] == [[1, 1], [0, 3]]
    told = Alarms("bad", (2.0,)).told(0.05, strict, truth)
    assert (told["found"], told["false"], told["rows"], told["expected"]) == ([1, 2], [0, 3], 1, 0.5)
