"""Which of two labels is the defect, and from which score on a picture is said to have it. N pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, floor
from typing import Any

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.tasks.images.outcome import Outcome

AUTO = "auto"
DEFECTIVE = frozenset({
    "bad", "defect", "defects", "defective", "ng", "nok", "not ok", "fault", "faults", "faulty", "broken", "damage",
    "damaged", "anomaly", "anomalous", "abnormal", "fail", "failed", "reject", "rejected", "scrap",
})  # fmt: skip
SOUND = frozenset({
    "good", "ok", "okay", "sound", "normal", "fine", "intact", "functional", "pass", "passed", "accepted",
})  # fmt: skip


def positive(asked: str | None, labels: Sequence[str]) -> str | None:
    """The label to be found among those of the training rows.

    Args:
        asked: `task.positive`: a label, `auto` (goes by the labels' names), or None for none.
        labels: The label set.

    Raises:
        UserError: It is none of the labels, there are more than two, or their names do not tell.
    """
    if asked is None:
        return None
    if asked != AUTO and asked not in labels:
        raise UserError(unknown("label", asked, labels, "task.positive"))
    if len(labels) != 2:
        named = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        what = f"task.positive={asked} needs two labels, and there are {len(labels)}: {named}"
        hint = (
            "put the folders of all kinds of defects into one, such as bad/scratch and bad/dent; or task.positive=null"
        )
        raise UserError(Mistake(what, "task.positive", hint=hint))
    if asked in labels:
        return asked
    found = [label for label in labels if _plain(label) in DEFECTIVE]
    if not found and any(_plain(label) in SOUND for label in labels):
        found = [label for label in labels if _plain(label) not in SOUND]
    if len(found) != 1:
        first, second = labels
        what = f"which of the labels {first!r} and {second!r} is the defect? Their names do not tell"
        raise UserError(Mistake(what, "task.positive", (f"task.positive={first}", f"task.positive={second}")))
    return found[0]


def _plain(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


@dataclass(frozen=True)
class Alarms:
    """When a picture is said to have what is looked for.

    Attributes:
        positive: The label to be found.
        others: Log-odds of the validation pictures that do not have it, the highest first; empty where there are none,
            and the likelier label is the answer.
    """

    positive: str
    others: tuple[float, ...] = ()

    def threshold(self, rate: float) -> float | None:
        """Log-odds above which a picture is said to have it; None where no validation picture tells.

        Of N others, a new one of their kind is above the k-th highest with probability k / (N + 1) (split conformal
        prediction; Vovk et al., 2005): k is the largest for which that is at most `rate`, and 1 where N is too few.
        """
        return self.others[self._above(rate) - 1] if self.others else None

    def probability(self, rate: float) -> float | None:
        """`threshold` as a probability: the score above which a picture is said to have it."""
        odds = self.threshold(rate)
        return None if odds is None else 1 / (1 + exp(min(-odds, 700)))

    def expected(self, rate: float) -> float:
        """The share of false alarms to be expected; more than `rate` where the validation pictures are too few."""
        return self._above(rate) / (len(self.others) + 1)

    def _above(self, rate: float) -> int:
        return max(1, min(floor(rate * (len(self.others) + 1) + 1e-9), len(self.others)))

    def told(self, rate: float, outcome: Outcome, truth: Sequence[Sequence[int]]) -> dict[str, Any]:
        """For the report: what was asked for, what is to be expected, and what came.

        Args:
            rate: `task.false_alarms`.
            outcome: Scores of some rows.
            truth: The class of each, as a list of one.

        Returns:
            `positive`; `asked` and `expected` (None where nothing tells), shares; `rows`, validation pictures that
            decide; `score`, the probability above which a picture has it; `found` and `false`, of how many each.
        """
        [said_N, true_N] = ([row == [outcome.positive] for row in rows] for rows in (outcome.guesses(), truth))
        hits = [said for said, true in zip(said_N, true_N, strict=True) if true]
        taken = [said for said, true in zip(said_N, true_N, strict=True) if not true]
        return {
            "positive": self.positive,
            "asked": rate,
            "expected": self.expected(rate) if self.others else None,
            "rows": len(self.others),
            "score": self.probability(rate) if self.others else 0.5,
            "found": [sum(hits), len(hits)],
            "false": [sum(taken), len(taken)],
        }

    def plain(self) -> dict[str, Any]:
        """For the lineage."""
        return {"positive": self.positive, "others": list(self.others)}


def known(saved: dict[str, Any] | None) -> Alarms | None:
    """From the lineage."""
    return Alarms(saved["positive"], tuple(saved["others"])) if saved else None
