"""Answers that end in a number, as those of GSM8K do: `... so 3 * 4 = <<3*4=12>>12.\\n#### 12`."""

from __future__ import annotations

import re
from fractions import Fraction

from peftcli.config.errors import Mistake, UserError
from peftcli.tasks.scoring.contract import Answered, Scored, Scorer

GAPS = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w)}}\]]) [-\N{{MINUS SIGN}}])? (?:(?:[$€£]|Rs\.?)\s?)?      # `10-5` and `10 - 5` hold no minus five
    (?:
        (?<![\d/]) (?:(?P<whole>\d+) [ ])? (?P<over>\d+) \s?/\s? (?P<under>0*[1-9]\d*) (?![\d/])
      | (?P<number>(?: \d{{1,3}}(?:,\d{{3}})+ | \d{{1,3}}(?:[{GAPS}]\d{{3}})+ | \d+ ) (?!\d) (?:\.\d+)?
        | (?<![\w.])\.\d+)
    )
    """,
    re.VERBOSE,
)
LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r" \1/\2"),
    (re.compile(r"\\boxed\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\{,\}|\\[,!;: ]"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
)
"""How numbers are written in LaTeX, and as they are read here."""
NEXT_QUESTION = re.compile(r"\n\s*(?:Question|Problem|Q|Human|User|### Instruction)\s*:", re.IGNORECASE)
"""Where a model that does not stop goes on with a question of its own."""
MARK = "####"
SPACED = re.compile(rf"{MARK}[\s#*$€£-]*\d{{1,3}}(?: \d{{3}})+(?!\d)")
"""Where a plain space parts thousands; elsewhere `5 100 dollar bills` are two numbers."""


class NumberScorer(Scorer):
    """`exact_match_strict` reads the number after `####`, `exact_match_flexible` the last number of the text.

    A row is right by the flexible number where that is the task's best metric, else by the strict one.
    """

    metrics = ("exact_match_strict", "exact_match_flexible")

    def check(self, completions: list[str]) -> None:
        """Where no completion has a number, no answer can be right."""
        if completions and all(wanted(text) is None for text in completions):
            what = f"none of the first {len(completions)} completions has a number"
            raise UserError(Mistake(what, "task.scoring", hint=f"the first one ends in {completions[0][-60:]!r}"))

    def score(self, answered: list[Answered]) -> Scored:
        values: dict[str, list[float]] = {name: [] for name in self.metrics}
        for one in answered:
            right = wanted(one.expected)
            for name, found in zip(self.metrics, (strict(one.written[0]), flexible(one.written[0])), strict=True):
                values[name].append(float(right is not None and found == right))
        return self.by_leading(values, self.metrics[0])


def wanted(completion: str) -> Fraction | None:
    """The right number of a row: the one after `####`, else the last one."""
    return flexible(completion) if MARK not in completion else strict(completion)


def strict(text: str) -> Fraction | None:
    """The number that follows the first `####`, with nothing but signs of money between them."""
    _, mark, rest = _own(text).partition(MARK)
    found = NUMBER.match(rest.lstrip("# *\t\n")) if mark else None
    return _value(found) if found else None


def flexible(text: str) -> Fraction | None:
    """The last number of a text, without what comes after a new question in it.

    Commas, or narrow spaces before three digits, part thousands, plain spaces after `####` alone; units, `$` and `%`
    count for nothing; `3/4` and `1 1/2` are fractions.
    """
    found = list(NUMBER.finditer(_own(text)))
    return _value(found[-1]) if found else None


def _own(text: str) -> str:
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    for pattern, plain in LATEX:
        text = pattern.sub(plain, text)
    return SPACED.sub(lambda found: found[0].replace(" ", ""), text)


def _value(found: re.Match[str]) -> Fraction:
    if found["over"]:
        size = int(found["whole"] or 0) + Fraction(int(found["over"]), int(found["under"]))
    else:
        size = Fraction(re.sub(rf"[,{GAPS}]", "", found["number"]))
    return -size if found["sign"] else size
