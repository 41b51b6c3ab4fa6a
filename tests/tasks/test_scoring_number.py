"""The number of an answer, in the many ways in which models write it."""

from __future__ import annotations

from fractions import Fraction

import pytest

from peftcli.config.errors import UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring import number, registry
from peftcli.tasks.scoring.contract import Answered


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### $1,000.00", 1000),
        ("####-5", -5),
        ("#### -$5", -5),
        ("#### \N{MINUS SIGN}5", -5),
        ("#### 18.", 18),
        ("#### 0.5", Fraction(1, 2)),
        ("#### 50%", 50),
        ("#### 12 apples", 12),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 12 500", 12500),
        ("####\n12", 12),
        ("#### \n**12 500**", 12500),
        ("#### Rs.500", 500),
        ("#### .5", Fraction(1, 2)),
        ("#### **42**", 42),
        ("#### \\boxed{42}", 42),
        ("#### 5\n#### 6", 5),
        ("#### 5\n\nQuestion: and 6?\nAnswer: 6\n#### 6", 5),
        ("Question: and 6?\n#### 6", 6),
        ("#### the answer is 5", None),
        ("####", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_strict_is_the_number_after_the_mark(text, wanted):
    assert number.strict(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The answer is 42.", 42),
        ("It costs $1,000.00.", 1000),
        ("so 1,000,000 people", 1000000),
        ("a list: 1,2,3", 3),
        ("weighs 12kg", 12),
        ("x=-3", -3),
        ("10-5", 5),
        ("10 - 5", 5),
        ("- 5 apples", 5),
        ("from 5-10", 10),
        ("it is -0.25", Fraction(-1, 4)),
        (".5", Fraction(1, 2)),
        ("50 %", 50),
        ("3/4 of them", Fraction(3, 4)),
        ("1 1/2 hours", Fraction(3, 2)),
        ("on 1/2/2020", 2020),
        ("5/0", 0),
        ("1\N{THIN SPACE}000\N{THIN SPACE}000", 1000000),
        ("He has 5 100 dollar bills", 100),
        ("He has 5 100 dollar bills.\n#### 12 500", 12500),
        ("Rs.500", 500),
        ("version 1.2.3", 3),
        ("only $.50", Fraction(1, 2)),
        ("1\N{NO-BREAK SPACE}000", 1000),
        ("$\\boxed{1{,}000}$", 1000),
        ("$\\boxed{\\$5.00}$", 5),
        ("$\\boxed{\\frac{3}{4}}$", Fraction(3, 4)),
        ("50\\%", 50),
        ("The answer is: 5\n\nQuestion: how many are 7?\nAnswer: 7", 5),
        ("5\n### Instruction:\n9", 5),
        ("abc12def", 12),
        ("#### 5 is right, not 6", 6),
        ("no number at all", None),
        ("", None),
    ],
)
def test_flexible_is_the_last_number(text, wanted):
    assert number.flexible(text) == wanted


def test_a_row_without_a_number_is_wrong_whatever_is_written():
    answered = [
        Answered({}, "so\n#### 1,000", ["#### 1000.0"]),
        Answered({}, "so\n#### 7", ["The answer is: 7"]),
        Answered({}, "none", ["none"]),
        Answered({}, "#### 7", ["#### 8"]),
    ]
    found = registry.build(GenerationConfig(scoring="number")).score(answered)
    assert found.metrics == {"exact_match_strict": 0.25, "exact_match_flexible": 0.5}
    assert found.right == [True, False, False, False]
    flexible = GenerationConfig(scoring="number", best_metric="exact_match_flexible")
    assert registry.build(flexible).score(answered).right == [True, True, False, False]


def test_completions_without_a_number_are_refused_before_training():
    with pytest.raises(UserError, match="none of the first 1 completions has a number"):
        registry.build(GenerationConfig(scoring="number")).check(["three"])
