"""Mathematical answers: which part of a text is the answer, and that a hostile one cannot stop the measurement."""

from __future__ import annotations

import threading

import pytest

from peftcli.config.errors import UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring import math, registry, verdicts
from peftcli.tasks.scoring.contract import Answered


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2}", "2", "2"),
        ("\\boxed{1} and \\boxed{2", "1", "1"),
        ("The answer is: $\\frac{1}{2}$.", "", "\\frac{1}{2}"),
        ("The answer is: \\frac{1}{2}", "", "\\frac{1}{2}"),
        ("#### 5\nThe answer is: 5", "", "5"),
        ("hence $x=3$ and $y=4$ at last", "", "y=4"),
        ("42", "", "42"),
        ("5. I hope it is correct", "", "5"),
        ("5. I have 3", "", "5"),
        ("The final answer is $5.5$. I hope it is correct, not $3$.", "", "5.5"),
        ("The answer is: **$12$**. Yes", "", "12"),
        ("**5**", "", "5"),
        ("The answer is \\$12 dollars.", "", "12"),
        ("exactly 5", "", "5"),
        ("5 because 3", "", "5"),
        ("$.5$", "", ".5"),
        ("Tom has 3. He buys 2. So it is 5.", "", "5"),
        ("The answer is minus 5", "", "minus 5"),
        ("The answer is 5 of the 12", "", "5 of the 12"),
        ("The answer is: 5\n\nProblem: and 7?\nThe answer is: \\boxed{7}", "", "5"),
        ("", "", ""),
    ],
)
def test_the_answer_of_a_text(text, strict, flexible):
    assert (math.boxed(text), math.flexible(text)) == (strict, flexible)


def test_equal_answers_in_other_words_also_in_a_thread():
    pairs = {
        ("\\frac{1}{2}", "0.5"): True,
        ("\\text{Tuesday}", "Tuesday"): True,
        ("10\\%", "10"): True,
        ("x^2+1", "1+x^2"): True,
        ("\\{1,2\\}", "\\{2,1\\}"): True,
        ("1,000", "1000"): True,
        ("x^{12}", "x^1 2"): False,
        ("3", "4"): False,
        ("3", "x)("): False,
        ("\\pi", "3.14"): False,
    }
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.extend(math.compare(list(pairs))))
    thread.start()
    thread.join()
    assert found == list(pairs.values())


def test_metrics_and_rows():
    answered = [
        Answered({}, "so $\\boxed{\\frac{1}{2}}$", ["thus \\boxed{0.5}"]),
        Answered({}, "so $\\boxed{\\frac{1}{2}}$", ["The answer is: 1/2"]),
        Answered({}, "so $\\boxed{7}$", ["\\boxed{8}"]),
        Answered({}, "so $\\boxed{7}$", [""]),
        Answered({}, "so $\\boxed{12}$", ["12 dollars"]),
        Answered({}, "so $\\boxed{3}$", ["5. I have 3"]),
        Answered({}, "so $\\boxed{5}$", ["5 because 3"]),
        Answered({}, "so $\\boxed{3}$", ["5 because 3"]),
    ]
    found = registry.build(GenerationConfig(scoring="math")).score(answered)
    assert found.metrics == {"math_verify_strict": 0.125, "math_verify": 0.5}
    assert found.right == [True, True, False, False, True, False, True, False]


@pytest.mark.slow
def test_a_comparison_without_end_is_no_match_and_the_others_are_made(monkeypatch):
    monkeypatch.setattr(math, "PROGRAM", [*math.PROGRAM[:2], "tests.tasks.endless"])
    pairs = [("1", "1.0"), ("1", "endless"), ("2", "2.0"), ("1", "killed"), ("3", "3.0")]
    assert math.compare(pairs) == [True, False, True, False, True]


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(math, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs math-verify, which is not installed") as caught:
        registry.build(GenerationConfig(scoring="math"))
    assert "pip install 'peftcli[math]'" in str(caught.value)


def test_a_library_that_breaks_is_told(monkeypatch):
    monkeypatch.setattr(math, "PROGRAM", [*math.PROGRAM[:2], "tests.tasks.nowhere"])
    with pytest.raises(RuntimeError, match="math-verify does not run"):
        math.compare([("1", "2")])
    assert verdicts.bare("\\text{a}\\%") == "a"
