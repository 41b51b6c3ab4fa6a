"""Measures of quality, each by the library the field quotes. N rows, C classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASSIFICATION = ("accuracy", "balanced_accuracy", "f1_macro", "loss")
TOKENS = ("loss", "perplexity")
LOWER_IS_BETTER = ("loss", "perplexity")


def classification(log_probabilities_NC: Tensor, targets_N: Tensor) -> dict[str, float]:
    """Accuracy, its mean over the classes present, macro F1 and cross-entropy in nats.

    Args:
        log_probabilities_NC: Logarithms of the classes' probabilities [N, C].
        targets_N: True classes, int64 [N].
    """
    from torchmetrics.functional import classification as tm

    classes = log_probabilities_NC.shape[1]
    predicted_N = log_probabilities_NC.argmax(1)
    recall_C = tm.multiclass_recall(predicted_N, targets_N, num_classes=classes, average="none")
    present_C = torch.bincount(targets_N, minlength=classes) > 0
    accuracy = tm.multiclass_accuracy(predicted_N, targets_N, num_classes=classes, average="micro")
    f1_macro = tm.multiclass_f1_score(predicted_N, targets_N, num_classes=classes, average="macro")
    return {
        "accuracy": _single(accuracy),
        # torchmetrics' macro average also counts a class that is predicted but never true, as nought.
        "balanced_accuracy": _single(recall_C[present_C].mean()),
        "f1_macro": _single(f1_macro),
        "loss": float(torch.nn.functional.nll_loss(log_probabilities_NC.double(), targets_N)),
    }


def _single(value: Tensor) -> float:
    """A number of single precision without the digits that it does not have: 0.33, not 0.33000001311302185."""
    return round(value.item(), 6)


def tokens(total: float, weight: int) -> dict[str, float]:
    """Mean loss a token in nats, and its exponential, from a sum over tokens and their number."""
    loss = total / weight
    return {"loss": loss, "perplexity": perplexity(loss)}


def perplexity(loss: float) -> float:
    """The exponential of a loss, infinite where no float holds it."""
    return math.exp(loss) if loss < 700 else math.inf
