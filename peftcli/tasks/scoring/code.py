"""Generated Python programs, judged by their tests: pass@k (MBPP, HumanEval)."""

from __future__ import annotations

import math

from peftcli.config import permission
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.prompts import Template
from peftcli.tasks.scoring import cage
from peftcli.tasks.scoring.contract import Answered, Scored, Scorer, means
from peftcli.tasks.scoring.programs import program
from peftcli.tasks.scoring.text import TextScorer

KS = (1, 5, 10, 100)


class CodeScorer(Scorer):
    """The share of programs whose tests pass, each run in the cage; a row's score is its own pass@1.

    It is right where its first program passes. Without `--allow-code` nothing is run, and the texts are compared.
    """

    def __init__(self, config: GenerationConfig):
        super().__init__(config)
        if config.tests is None:
            what = "task.scoring=code needs task.tests: what is run after a program"
            raise UserError(Mistake(what, hint='for example "{tests}"'))
        self.start, self.tests = Template(config.program, "task.program"), Template(config.tests, "task.tests")
        _check_python(self.tests)
        self.columns = tuple(dict.fromkeys([*self.start.columns, *self.tests.columns]))
        self.metrics = tuple(f"pass_at_{k}" for k in KS if k <= config.samples)
        self.notes = () if permission.is_given() else (permission.LEFT_OUT,)
        self.judged = config.scoring if permission.is_given() else self.by_first("text (no program was run)")

    def check(self, completions: list[str]) -> None:
        """Raises UserError where programs have to be run and may not, or cannot be run safely on this system."""
        permission.require(self.config)
        if permission.is_given():
            cage.check()

    def score(self, answered: list[Answered]) -> Scored:
        permission.require(self.config)
        if not permission.is_given():
            return TextScorer(self.config).score(answered)
        jobs = [
            cage.Job(program(text, self.start.fill(answer.row)), self.tests.fill(answer.row))
            for answer in answered
            for text in answer.written
        ]
        results = iter(cage.run(jobs))
        each = [[next(results) for _ in answer.written] for answer in answered]
        passed = [[result.outcome == "passed" for result in of_row] for of_row in each]
        rows = {
            f"pass_at_{k}": [pass_at(k, len(of_row), sum(of_row)) for of_row in passed]
            for k in KS
            if all(k <= len(of_row) for of_row in passed)
        }
        return Scored(
            means(rows),
            rows["pass_at_1"],
            [of_row[0] for of_row in passed],
            rows,
            proportions=tuple(rows),
            remarks=["" if first.outcome == "passed" else f"{first.outcome}: {first.error}" for first, *_ in each],
        )


def _check_python(tests: Template) -> None:
    """Refuse tests that no row could make into Python, before each program fails by them."""
    try:
        compile(tests.render(dict.fromkeys(tests.columns, "x")), "task.tests", "exec")
    except (SyntaxError, ValueError) as error:
        what = f"task.tests={tests.text!r} is no Python with a name in place of each column: {error}"
        hint = "a new line is a new line on the command line; \\n is one in a YAML file, in double quotes"
        raise UserError(Mistake(what, hint=hint)) from None


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that of `k` programs drawn from `n` without putting back, `c` of them right, at least one is right.

    Unbiased for pass@k (Chen et al. 2021, equation 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
