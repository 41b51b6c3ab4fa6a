"""What a picture classifier's scores mean: probabilities, answers, how good and how wrong. N rows, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.tasks.images import metrics

SEPARATOR = "|"
"""Between the labels of a row that has several."""


@dataclass(frozen=True)
class Outcome:
    """The scores of some rows.

    Attributes:
        logits_NK: On the CPU.
        classes: Their names.
        positive: The class to be found; None where none is.
        multilabel: A row may have several, each decided by itself.
        false_alarms: `task.false_alarms`.
        threshold: Log-odds of `positive` above which it is the answer; None takes the likelier class.
    """

    logits_NK: Tensor
    classes: list[str]
    positive: int | None
    multilabel: bool
    false_alarms: float = metrics.FALSE_ALARMS
    threshold: float | None = None

    @cached_property
    def chances_NK(self) -> Tensor:
        """Probabilities; over all classes of a row together they are one, but not where it may have several."""
        return self.logits_NK.sigmoid() if self.multilabel else self.logits_NK.softmax(1)

    def measure(self, truth: Sequence[Sequence[int]]) -> dict[str, float]:
        """Metrics against the classes that each row has."""
        if self.multilabel:
            return metrics.multi_label(self.logits_NK, self._targets(truth), self.false_alarms)
        targets_N = torch.tensor([row[0] for row in truth])
        log_NK = self.logits_NK.log_softmax(1)
        answers_N = None if self.threshold is None else torch.tensor([row[0] for row in self.guesses()])
        return metrics.single_label(log_NK, targets_N, self.positive, self.false_alarms, answers_N)

    def _targets(self, truth: Sequence[Sequence[int]]) -> Tensor:
        targets_NK = torch.zeros_like(self.logits_NK)
        for target_K, row in zip(targets_NK, truth, strict=True):
            target_K[list(row)] = 1.0
        return targets_NK

    def guesses(self) -> list[list[int]]:
        """Numbers of the classes that each row is said to have: the likeliest, or that to be found where its odds are
        above the threshold, or those likelier than not."""
        if self.threshold is not None:
            assert self.positive is not None
            return [[self.positive if odds > self.threshold else 1 - self.positive] for odds in self.odds().tolist()]
        if not self.multilabel:
            return self.logits_NK.argmax(1, keepdim=True).tolist()
        return [torch.nonzero(logits_K > 0).flatten().tolist() for logits_K in self.logits_NK]

    def odds(self) -> Tensor:
        """Log-odds of the class to be found, fp64 [N]."""
        assert self.positive is not None
        return metrics.odds(self.logits_NK.double().log_softmax(1), self.positive)

    def answers(self) -> list[dict[str, Any]]:
        """`predicted`, a label or a list of them, `score` and `probabilities` of each row."""
        found = []
        for guess, chance_K in zip(self.guesses(), self.chances_NK, strict=True):
            score = chance_K.max() if self.positive is None else chance_K[self.positive]
            named = [self.classes[i] for i in guess]
            shares = {label: _short(chance) for label, chance in zip(self.classes, chance_K, strict=True)}
            found.append(
                {"predicted": named if self.multilabel else named[0], "score": _short(score), "probabilities": shares}
            )
        return found

    def drawn(self, truth: Sequence[Sequence[int]]) -> dict[str, Any]:
        """`reliability`, and with one class a row `confusion`: `labels`, and `counts` by true class and answer."""
        if self.multilabel:
            right_NK = (self.logits_NK > 0) == self._targets(truth).bool()
            return {"reliability": metrics.reliability(self.logits_NK.abs().sigmoid().flatten(), right_NK.flatten())}
        targets_N, (chance_N, guess_N) = torch.tensor([row[0] for row in truth]), self.chances_NK.max(1)
        answered_N = torch.tensor([row[0] for row in self.guesses()])
        counts = metrics.confusion(answered_N, targets_N, len(self.classes))
        confusion = {"labels": self.classes, "counts": counts}
        return {"confusion": confusion, "reliability": metrics.reliability(chance_N, guess_N == targets_N)}

    def examples(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with their answers, the surest of the wrong first and the surest of the right last.

        Args:
            rows: Each `row`, `name` and `labels`.
        """
        if self.multilabel:
            targets_NK = self._targets([row["labels"] for row in rows])
            loss_N = F.binary_cross_entropy_with_logits(self.logits_NK, targets_NK, reduction="none").sum(1)
        else:
            loss_N = F.cross_entropy(self.logits_NK, torch.tensor([row["labels"][0] for row in rows]), reduction="none")
        answers, guesses = self.answers(), self.guesses()
        return [
            {
                "row": rows[i]["row"],
                "input": rows[i]["name"],
                "expected": self._joined(rows[i]["labels"]),
                "predicted": self._joined(guesses[i]) or "none",
                "correct": sorted(guesses[i]) == sorted(rows[i]["labels"]),
                "score": answers[i]["score"],
            }
            for i in loss_N.argsort(descending=True, stable=True).tolist()
        ]

    def _joined(self, numbers: Sequence[int]) -> str:
        return SEPARATOR.join(self.classes[i] for i in numbers)


def _short(chance: Tensor) -> float:
    """A number of single precision without the digits that it does not have."""
    return float(f"{chance.item():.7g}")
