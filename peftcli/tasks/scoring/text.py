"""Answers as texts: ROUGE, BLEU, whether they are the same, and whether a final answer in them is."""

from __future__ import annotations

import json
import re

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring.contract import Answered, Scored, Scorer, means

DRAWS = 1000
"""Bootstrap samples of a corpus's BLEU."""


class TextScorer(Scorer):
    """A row's score is its ROUGE-L; it is right where the texts are equal, or with `task.answer` the answers are."""

    metrics: tuple[str, ...] = ("rouge_1", "rouge_2", "rouge_l", "bleu", "exact_match")

    def __init__(self, config: GenerationConfig):
        super().__init__(config)
        if config.answer is None:
            return
        self.metrics = (*self.metrics, "answer_accuracy")
        try:
            groups = re.compile(config.answer).groups
        except re.error as error:
            what = f"task.answer={config.answer!r} is no regular expression: {error}"
            raise UserError(Mistake(what, "task.answer")) from None
        if not groups:
            what = f"task.answer={config.answer!r} has no group"
            raise UserError(Mistake(what, "task.answer", hint="put ( ) around the answer"))

    def check(self, completions: list[str]) -> None:
        """Where `task.answer` matches none of them, every answer would count as wrong."""
        pattern = self.config.answer
        if pattern is not None and all(answer(pattern, text) is None for text in completions):
            what = f"task.answer={pattern!r} matches none of the first {len(completions)} completions"
            raise UserError(Mistake(what, hint=f"the first one ends in {completions[0][-60:]!r}"))

    def score(self, answered: list[Answered]) -> Scored:
        written, expected = [a.written[0] for a in answered], [a.expected for a in answered]
        values = rouge(written, expected)
        right = [text == wanted for text, wanted in zip(written, expected, strict=True)]
        values["exact_match"] = [float(same) for same in right]
        if pattern := self.config.answer:
            right = [
                same_answer(answer(pattern, text), answer(pattern, wanted))
                for text, wanted in zip(written, expected, strict=True)
            ]
            values["answer_accuracy"] = [float(same) for same in right]
        corpus, interval = bleu(written, expected)
        measured = means(values) | {"bleu": corpus}
        found = {name: measured[name] for name in self.metrics}
        proportions = ("exact_match", "answer_accuracy")
        return Scored(found, values["rouge_l"], right, values, proportions, {"bleu": interval})


def rouge(written: list[str], expected: list[str]) -> dict[str, list[float]]:
    """ROUGE F1 of each text, 0 to 1, on words, pairs of words and the longest common subsequence (Lin 2004).

    Latin letters and digits only, as rouge_score defines it, and without stemming.
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    found = [scorer.score(wanted, text) for text, wanted in zip(written, expected, strict=True)]
    return {ours: [row[theirs].fmeasure for row in found] for ours, theirs in names.items()}


def bleu(written: list[str], expected: list[str]) -> tuple[float, tuple[float, float]]:
    """Corpus BLEU by sacrebleu's defaults, 0 to 100, and its 95 % interval by sacrebleu's bootstrap."""
    from sacrebleu.metrics import BLEU

    measure = BLEU()
    found = measure.corpus_score(written, [expected], n_bootstrap=DRAWS)
    told = json.loads(found.format(6, signature=str(measure.get_signature()), is_json=True))
    mean, half = told.get("confidence_mean", found.score), told.get("confidence_var", 0.0)
    return found.score, (max(0.0, mean - half), min(100.0, mean + half))


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
