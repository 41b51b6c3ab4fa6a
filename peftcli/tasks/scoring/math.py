"""Answers that are mathematical expressions, as those of MATH are: `... so the answer is $\\boxed{\\frac{1}{2}}$.`"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring.contract import Answered, Scored, Scorer
from peftcli.tasks.scoring.number import NEXT_QUESTION
from peftcli.tasks.scoring.verdicts import READY

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
SAID = re.compile(r"(?:final answer|answer)\s*(?:is|:)\s*:?\s*(.+)", re.IGNORECASE)
SENTENCE = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bSt)\.\**\s+(?=(?:[^$]*\$[^$]*\$)*[^$]*$)")
"""A sentence's end that is not within a formula."""
REASON = re.compile(r",?\s+(?:because|since)\b.*", re.IGNORECASE)
NUMERAL = r"(?:\\?\$)?-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\s?\\?%)?"
WORD = (
    r"(?!(?:minus|negative|not|half|third|quarter|plus|times|over|by|to|or|and|mod|base|power|squared|cubed|root|log|ln|exp"
    r"|sqrt|pi|sin|cos|tan|sec|csc|cot|dozen|hundred|thousand|million|billion|trillion)\b)[A-Za-z][A-Za-z'-]+"
)
"""One that leaves the number beside it as it is."""
COUNTED = re.compile(rf"(?:{WORD}\s+)*({NUMERAL})(?:\s+{WORD})*", re.IGNORECASE)
"""A number among words, such as `exactly 5` or `12 dollars`."""
PROGRAM = [sys.executable, "-m", "peftcli.tasks.scoring.verdicts"]


class MathScorer(Scorer):
    """Compares answers by math-verify: `0.5` is `\\frac{1}{2}`.

    `math_verify_strict` reads the last `\\boxed{}` alone; `math_verify` takes, where there is none, what follows the
    last "answer is", or else the last formula between dollar signs, or the last line.
    """

    metrics = ("math_verify_strict", "math_verify")

    def __init__(self, config: GenerationConfig):
        super().__init__(config)
        if find_spec("math_verify") is None:
            hint = "pip install 'peftcli[math]'"
            raise UserError(Mistake("task.scoring=math needs math-verify, which is not installed", hint=hint))

    def check(self, completions: list[str]) -> None:
        """Where no completion has an answer, none can be right."""
        if completions and not any(flexible(text) for text in completions):
            raise UserError(Mistake(f"none of the first {len(completions)} completions has an answer", "task.scoring"))

    def score(self, answered: list[Answered]) -> Scored:
        pairs = [(flexible(one.expected), read(one.written[0])) for read in (boxed, flexible) for one in answered]
        asked = [pair for pair in dict.fromkeys(pairs) if all(pair)]
        verdicts = dict(zip(asked, compare(asked), strict=True))
        right = [float(verdicts.get(pair, False)) for pair in pairs]
        n = len(answered)
        values = dict(zip(self.metrics, (right[:n], right[n:]), strict=True))
        return self.by_leading(values, self.metrics[-1])


def boxed(text: str) -> str:
    """The contents of the last `\\boxed{}` that is closed; nothing where there is none."""
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    for found in reversed(list(BOX.finditer(text))):
        depth = 0
        for i in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[found.end() + 1 : i].strip()
    return ""


def flexible(text: str) -> str:
    """The answer of a text, boxed or not; nothing where the text is empty.

    Of prose it is a sentence without its reasons, and where that holds one number beside words, the number.
    """
    if inside := boxed(text):
        return inside
    text = NEXT_QUESTION.split(text, maxsplit=1)[0]
    lines = text.strip().splitlines()
    said = SAID.findall(text)
    tail = said[-1] if said else lines[-1] if lines else ""
    sentences = SENTENCE.split(tail)
    leads = bool(said) or re.fullmatch(NUMERAL, sentences[0].strip("* ")) is not None
    tail = sentences[0 if leads else -1]
    if formulas := re.findall(r"\$([^$]+)\$", tail if leads else text):
        return formulas[-1].strip().rstrip(".").strip()
    tail = REASON.sub("", tail).strip(" $*").rstrip(".*").strip()
    counted = COUNTED.fullmatch(tail)
    return counted[1].lstrip("\\$") if counted else tail


def compare(pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the answers of each pair mean the same; a pair whose comparison cannot be finished is no match.

    Raises:
        RuntimeError: math-verify does not run here.
    """
    verdicts: list[bool] = []
    while len(verdicts) < len(pairs):
        left = pairs[len(verdicts) :]
        lines = "".join(json.dumps(pair) + "\n" for pair in left)
        done = subprocess.run(PROGRAM, input=lines, capture_output=True, text=True)
        ready, *found = done.stdout.split() or [""]
        if ready != READY:
            raise RuntimeError(f"math-verify does not run: {done.stderr[-500:]}")
        verdicts += [*(verdict == "true" for verdict in found), False][: len(left)]
    return verdicts
