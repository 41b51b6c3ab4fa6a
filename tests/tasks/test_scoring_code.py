"""pass@k, and the program in what a model has written."""

from __future__ import annotations

import itertools
import sys

import pytest

from peftcli.config import permission
from peftcli.config.errors import UserError
from peftcli.config.rules import SCORED
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring import registry
from peftcli.tasks.scoring.code import pass_at
from peftcli.tasks.scoring.contract import Answered
from peftcli.tasks.scoring.programs import program

ADD = "def add(a, b):\n    return a + b"
HEAD = 'import math\n\n\ndef add(a: int, b: int) -> int:\n    """Add.\n    >>> add(1, 2)\n    3\n    """\n'
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the cage is made for Linux")


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 5), (6, 6, 2), (7, 0, 7)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at(k, n, c) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_1_is_the_share_and_large_numbers_are_exact():
    assert pass_at(1, 200, 50) == pytest.approx(0.25)
    assert 0.9 < pass_at(10, 200, 50) < 1
    assert pass_at(100, 200, 150) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        ADD,
        f"\n\n{ADD}\n",
        f"```python\n{ADD}\n```",
        f"```\n{ADD}\n```",
        f"Sure! Here is it:\n\n```python\n{ADD}\n```\n\nThis adds `a` and `b`. Use it:\n```python\nadd(1, 2)\n```",
        f"First install it:\n```bash\npip install add\n```\n```python\n{ADD}\n```",
        f"```python\n{ADD}",
        f"{ADD}\n```\n\nThis function adds two numbers.",
        f"{ADD}\n```\nUsage:\n```python\nadd(1, 2)\n```",
        f"Here is the function:\n{ADD}\nIt adds two numbers, doesn't it?",
        f"from the text we see:\n{ADD}\n",
        f"{ADD}\n\nprint(add(1, 2))\nassert add(1, 2) == 4",
        f"{ADD}\n\nif __name__ == '__main__':\n    print(add(int(input()), 1))",
        f"[BEGIN]\n{ADD}\n[DONE]\n\nYou are an expert Python programmer, and here is your task",
        f"{ADD}\n\ndef broken(x):\n    return (x",
        f"{ADD}\n\ndef broken(x):",
        f"  ```python\n  {ADD.replace(chr(10), chr(10) + '  ')}\n  ```",
        ADD.replace("\n", "\r\n"),
        f'"""A module."""\n{ADD}',
    ],
)
def test_the_whole_program_is_found(text):
    assert program(text).strip() == ADD


@pytest.mark.parametrize(
    "after",
    [
        "S = [True] * 9\nfor k in range(4, 9, 2):\n    S[k] = False",
        "A: int = 4",
        "x = 1\nx += 1",
        "if True:\n    A = 4",
        "with open('a') as f:\n    A = f.read()",
        "try:\n    A = 4\nexcept ValueError:\n    pass",
        "memo = {}\nmemo.update(a=1)\nA = memo",
    ],
)
@pytest.mark.parametrize(
    "uses", ["", "\nprint(f(1))\nassert f(1)", "\nif __name__ == '__main__':\n    f(1)", "\nNote: done"]
)
def test_statements_that_a_program_needs_stay_and_its_uses_go(after, uses):
    whole = f"def f(n):\n    return n\n{after}"
    assert program(whole + uses) == whole
    assert program(f"{ADD}\nreturn 1") == ADD


def test_imports_in_a_fence_of_their_own_stay():
    imports, use = "```python\nimport math\nfrom re import sub\n```", "```\nadd(1, 2)\n```"
    text = f"First:\n{imports}\nThen:\n```python\n{ADD}\n```\nUse:\n{use}"
    assert program(text).split("\n") == ["import math", "from re import sub", "", *ADD.split("\n")]
    assert program(f"```\nprint(1)\n```\n```\n{ADD}\n```") == ADD


def test_what_belongs_to_a_program_stays():
    decorated = "@staticmethod\ndef f(x):\n    return x"
    kept = f"import sys\nsys.setrecursionlimit(10**6)\nLIMIT = 3\n\n{decorated}\n\ng = lambda x: f(x)"
    assert program(kept + "\nprint(g(1))") == kept
    assert program(decorated) == decorated
    assert program("try:\n    import numpy\nexcept ImportError:\n    pass\n\n" + ADD).startswith("try:")


@pytest.mark.parametrize(
    "text", ["", "   ", "I cannot do that.", "```python\n```", "((((" * 5000, "\x00", "-" * 20000 + "1"]
)
def test_no_program_is_left_as_it_is_and_breaks_nothing(text):
    assert isinstance(program(text), str)
    assert program(text, HEAD).startswith(HEAD)


@pytest.mark.parametrize(
    "text",
    [
        "    return a + b",
        "    return a + b\n",
        "return a + b",
        "\n    return a + b",
        "    return a + b\n\n\ndef other():\n    return 0",
        "    return a + b\n\nprint(add(1, 2))",
        "    return a + b\n# that is all\nassert False",
        "    return a + b\n\n\ndef add(a, b):\n    return 0",
        "return a + b\n\n\ndef add(a, b):\n    return 0",
        "    x = a\n    if b:\n        x += b\n    return x\nif True:\n    1/0",
        "x = a\n    if b:\n        x += b\n    return x",
        "    return (a\n+ b)\nprint('no')",
        '    text = """\nnot code\n"""\n    return a + b\nclass X: pass',
        ADD,
        f"```python\n{ADD}\n```",
        f"Here is the completed function:\n\n```python\n{HEAD}    return a + b\n```\nIt adds.",
        "```python\n    return a + b\n```",
        "    return a + b\n```\n\nThis adds.",
        "def add(a, b): return a + b",
        "from math import inf\n\ndef add(a, b):\n    return a + b",
    ],
)
def test_a_continuation_becomes_a_program(text):
    names: dict = {}
    exec(compile(program(text, HEAD), "<program>", "exec"), names)
    assert names["add"](2, 3) == 5
    assert "math" in names


def test_a_head_without_a_docstring():
    names: dict = {}
    exec(program("return x + 1\n\nprint(f(", "def f(x):\n"), names)
    assert names["f"](1) == 2


def made(**settings):
    return registry.build(GenerationConfig(**{"scoring": "code", "tests": "{tests}", **settings}))


ROWS = [
    Answered(
        {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
        ADD,
        [ADD, "def add(a, b): return 3", ADD, "", "x"],
    ),
    Answered({"tests": ["assert f(1) == 1"]}, "def f(x): return x", ["def f(x): return 2"] + ["no"] * 4),
]


@ON_LINUX
def test_programs_are_scored_by_their_tests():
    with permission.code(True):
        scorer = made(samples=5)
        assert scorer.notes == ()
        scorer.check([])
        found = scorer.score(ROWS)
    assert scorer.metrics == ("pass_at_1", "pass_at_5")
    assert found.metrics == pytest.approx({"pass_at_1": 0.2, "pass_at_5": 0.5})
    assert found.rows == {"pass_at_1": pytest.approx([0.4, 0.0]), "pass_at_5": [1.0, 0.0]}
    assert (found.scores, found.right) == (pytest.approx([0.4, 0.0]), [True, False])
    assert found.remarks == ["", "failed: AssertionError: assert f(1) == 1"]


@ON_LINUX
def test_humaneval_is_the_head_and_its_check():
    row = {"head": HEAD, "test": "def check(candidate):\n    assert candidate(1, 2) == 3", "name": "add"}
    with permission.code(True):
        scorer = made(program="{head}", tests="{test}\ncheck({name})")
        found = scorer.score(
            [Answered(row, "    return a + b\n", ["return a + b\n\nprint(1)"]), Answered(row, "", [""])]
        )
    assert set(scorer.columns) == {"head", "test", "name"}
    assert found.right == [True, False]


def test_without_permission_texts_are_compared_and_nothing_is_run(monkeypatch, tmp_path):
    from peftcli.tasks.scoring import cage

    monkeypatch.setattr(cage, "run", lambda *_: pytest.fail("a program was run"))
    scorer = made()
    assert "--allow-code" in scorer.notes[0]
    assert scorer.judged == "text (no program was run)"
    assert made(samples=5).judged == "text (no program was run), the first of 5 samples alone"
    with permission.code(True):
        assert made(samples=5).judged == "code"
    scorer.check([])
    found = scorer.score(ROWS)
    assert "pass_at_1" not in found.metrics
    assert found.metrics["exact_match"] == 0.5


def test_a_metric_that_needs_permission_is_refused():
    with pytest.raises(UserError, match="--allow-code"):
        made(best_metric="pass_at_1").check([])
    with pytest.raises(UserError, match=r"task\.tests"):
        made(tests=None)
    with pytest.raises(UserError, match="is no Python"):
        made(tests="{test}\\ncheck({name})")


def test_permission_ends_with_the_command(monkeypatch):
    monkeypatch.setenv(permission.VARIABLE, "1")
    with permission.code(False):
        assert not permission.is_given()
        with permission.code(True):
            assert permission.is_given()
        assert not permission.is_given()


def test_the_rules_know_the_metrics():
    assert made(samples=100).metrics == SCORED["code"]
