"""Measures of picture classifiers. N rows, C classes or labels, B bins.

Ranks are taken from log-odds in double precision: probabilities in single precision round to 1, and ties that the model
did not make would change the areas. A class that no row has, or every row, has no such area and is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.tasks import metrics

SINGLE = (*metrics.CLASSIFICATION, "auroc", "average_precision", "recall_at_false_alarms", "calibration_error")
MULTI = (
    "accuracy", "exact_match", "balanced_accuracy", "f1_macro", "auroc", "average_precision",
    "recall_at_false_alarms", "calibration_error", "loss",
)  # fmt: skip
LOWER_IS_BETTER = (*metrics.LOWER_IS_BETTER, "calibration_error")
FALSE_ALARMS = 0.05
BINS = 15


def single_label(
    log_probabilities_NC: Tensor,
    targets_N: Tensor,
    positive: int | None = None,
    false_alarms: float = FALSE_ALARMS,
    answers_N: Tensor | None = None,
) -> dict[str, float]:
    """`SINGLE` of a task with one label a row.

    Args:
        log_probabilities_NC: Logarithms of the classes' probabilities [N, C].
        targets_N: True classes, int64 [N].
        positive: The class that is looked for, such as a defect: AUROC, average precision and recall are about it.
            None takes the mean over the classes, each against all others.
        false_alarms: Share of the other rows that may be taken for the class in `recall_at_false_alarms`.
        answers_N: The classes that were answered, int64 [N]; None takes the likeliest.

    Returns:
        Shares 0 to 1, and `loss` in nats. `auroc`, `average_precision` and `recall_at_false_alarms` are missing where
        no class has both rows that are of it and rows that are not.
    """
    log_NC = log_probabilities_NC.double()
    true_NC = F.one_hot(targets_N, log_NC.shape[1]).bool()
    asked = range(log_NC.shape[1]) if positive is None else [positive]
    confidence_N, guess_N = log_NC.exp().max(1)
    answered = metrics.classification(log_probabilities_NC, targets_N)
    if answers_N is not None:
        said_NC = F.one_hot(answers_N, log_NC.shape[1])
        answered = {**metrics.classification(said_NC, targets_N), "loss": answered["loss"]}
    return {
        **answered,
        **_ranked({c: (odds(log_NC, c), true_NC[:, c]) for c in asked}, false_alarms),
        "calibration_error": calibration_error(confidence_N, guess_N == targets_N),
    }


def odds(log_NC: Tensor, chosen: int) -> Tensor:
    """Log-odds of a class against all others [N]."""
    others = [c for c in range(log_NC.shape[1]) if c != chosen]
    return log_NC[:, chosen] - log_NC[:, others].logsumexp(1)


def multi_label(logits_NC: Tensor, targets_NC: Tensor, false_alarms: float = FALSE_ALARMS) -> dict[str, float]:
    """`MULTI` of a task with any number of labels a row, each decided by itself at one half.

    Args:
        logits_NC: Log-odds of the labels [N, C].
        targets_NC: Whether a row has the label, 0 or 1 [N, C].
        false_alarms: As in `single_label`.

    Returns:
        `accuracy` counts decisions, `exact_match` rows with all of them right; `f1_macro` is the mean over the labels
        that occur or are predicted, `balanced_accuracy` over those that some rows have and some have not; the others
        as in `single_label`. `loss` is the mean over decisions.
    """
    logits_NC, true_NC = logits_NC.double(), targets_NC.bool()
    guess_NC = logits_NC > 0
    right_NC = guess_NC == true_NC
    hits_C, had_C, said_C = (guess_NC & true_NC).sum(0), true_NC.sum(0), guess_NC.sum(0)
    f1_C = (2 * hits_C / (had_C + said_C))[had_C + said_C > 0]
    measured = {
        "accuracy": right_NC.double().mean(),
        "exact_match": right_NC.all(1).double().mean(),
        "f1_macro": f1_C.double().mean() if len(f1_C) else torch.tensor(0.0),
        "loss": F.binary_cross_entropy_with_logits(logits_NC, true_NC.double()),
    }
    mixed_C = (had_C > 0) & (had_C < len(true_NC))
    if mixed_C.any():
        absent_C = (~guess_NC & ~true_NC).sum(0) / (len(true_NC) - had_C)
        measured["balanced_accuracy"] = ((hits_C / had_C + absent_C) / 2)[mixed_C].double().mean()
    confidence_NC = logits_NC.abs().sigmoid()
    return {
        **{name: round(value.item(), 6) for name, value in measured.items()},
        **_ranked({c: (logits_NC[:, c], true_NC[:, c]) for c in range(logits_NC.shape[1])}, false_alarms),
        "calibration_error": calibration_error(confidence_NC.flatten(), right_NC.flatten()),
    }


def _ranked(scored: dict[int, tuple[Tensor, Tensor]], false_alarms: float) -> dict[str, float]:
    """Means over the classes that have both kinds of rows; empty where none has."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    found: dict[str, list[float]] = {"auroc": [], "average_precision": [], "recall_at_false_alarms": []}
    for scores_N, true_N in scored.values():
        if bool(true_N.all()) or not bool(true_N.any()):
            continue
        # Hopeless and certain rows have infinite odds, which scikit-learn refuses; their order is what counts.
        ranks_N = torch.unique(scores_N, return_inverse=True)[1].cpu().numpy()
        truth_N = true_N.cpu().numpy()
        found["auroc"].append(float(roc_auc_score(truth_N, ranks_N)))
        found["average_precision"].append(float(average_precision_score(truth_N, ranks_N)))
        found["recall_at_false_alarms"].append(recall_at(scores_N, true_N, false_alarms))
    return {name: round(sum(values) / len(values), 6) for name, values in found.items() if values}


def recall_at(scores_N: Tensor, true_N: Tensor, false_alarms: float) -> float:
    """The highest share of the true rows found by a threshold that at most `false_alarms` of the others pass.

    Rows of equal score are found together; nothing is interpolated between thresholds.
    """
    from sklearn.metrics import roc_curve

    ranks_N = torch.unique(scores_N, return_inverse=True)[1].cpu().numpy()
    false, found, _ = roc_curve(true_N.cpu().numpy(), ranks_N, drop_intermediate=False)
    return float(found[false <= false_alarms + 1e-12].max())


def confusion(guesses_N: Tensor, targets_N: Tensor, classes: int) -> list[list[int]]:
    """How many rows of each true class (a row of the table) were taken for each class (a column)."""
    counts = torch.bincount(targets_N * classes + guesses_N, minlength=classes * classes)
    return counts.reshape(classes, classes).tolist()


def reliability(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """What confidence promised and what came: `confidence`, `accuracy`, `rows` of each bin that has rows.

    Bins have equal widths and hold their upper end (Guo et al., 2017, arXiv 1706.04599).
    """
    confidence_N, right_N = confidence_N.double(), right_N.double()
    bin_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    counts_B = torch.bincount(bin_N, minlength=bins)
    said_B = torch.bincount(bin_N, confidence_N, minlength=bins) / counts_B
    came_B = torch.bincount(bin_N, right_N, minlength=bins) / counts_B
    return [
        {"confidence": round(said, 6), "accuracy": round(came, 6), "rows": rows}
        for said, came, rows in zip(said_B.tolist(), came_B.tolist(), counts_B.tolist(), strict=True)
        if rows
    ]


def calibration_error(confidence_N: Tensor, right_N: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: the mean gap of `reliability`, bins weighing as much as they have rows."""
    found = reliability(confidence_N, right_N, bins)
    total = sum(one["rows"] for one in found)
    return round(sum(one["rows"] * abs(one["confidence"] - one["accuracy"]) for one in found) / total, 6)
