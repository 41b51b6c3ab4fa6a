"""Scorers by name, and answers as texts."""

from __future__ import annotations

import pytest

from peftcli.config import rules
from peftcli.config.errors import UserError
from peftcli.config.schema import GenerationConfig
from peftcli.tasks.scoring import registry
from peftcli.tasks.scoring.contract import Answered


def test_every_scorer_measures_what_the_rules_allow():
    assert set(registry.SCORERS) == set(rules.SCORED)
    for name in ("number", "math"):
        assert registry.build(GenerationConfig(scoring=name)).metrics == rules.SCORED[name]
    assert registry.build(GenerationConfig(answer="(.)")).metrics == rules.SCORED["text"]
    with pytest.raises(UserError, match="unknown scoring 'numbr'"):
        registry.build(GenerationConfig(scoring="numbr"))


def test_texts():
    scorer = registry.build(GenerationConfig())
    found = scorer.score([Answered({}, "the cat sat", ["the cat sat"]), Answered({}, "the cat sat", ["the dog sat"])])
    assert found.metrics["exact_match"] == 0.5
    assert found.metrics["rouge_1"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.metrics["rouge_2"] == 0.5
    assert found.scores == pytest.approx([1, 2 / 3])
    assert found.right == [True, False]
    assert set(found.proportions) & set(found.rows) == {"exact_match"}
    assert {*found.rows, *found.intervals} == {*found.metrics}
