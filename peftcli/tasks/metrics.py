"""Measures of quality, each by the library the field quotes. N rows, C classes."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

CLASSIFICATION = ("accuracy", "balanced_accuracy", "f1_macro", "loss")
TOKENS = ("loss", "perplexity")
TEXTS = ("rouge_l", "bleu", "exact_match")
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
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def rouge_l(predicted: list[str], expected: list[str]) -> list[float]:
    """ROUGE-L F1 of each text, 0 to 1 (Latin letters and digits only, as the score is defined)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(right, text)["rougeL"].fmeasure for text, right in zip(predicted, expected, strict=True)]


def bleu(predicted: list[str], expected: list[str]) -> float:
    """Corpus BLEU by sacrebleu's defaults, 0 to 100."""
    import sacrebleu

    return sacrebleu.corpus_bleu(predicted, [expected]).score


def answer(pattern: str, text: str) -> str | None:
    """The final answer: the first group of the pattern's last match, or None where it matches nothing."""
    found = list(re.finditer(pattern, text))
    return found[-1].group(1).strip() if found and found[-1].group(1) is not None else None


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same text or the same number (`1,000.0` is `1000`); no answer is never right."""
    if a is None or b is None:
        return False
    try:
        return float(a.replace(",", "").strip("$ .")) == float(b.replace(",", "").strip("$ ."))
    except ValueError:
        return a == b
