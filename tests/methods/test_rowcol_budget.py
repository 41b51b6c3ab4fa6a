"""Sharing a budget out over layers: never above it, never past break-even, the same each time, more for more."""

from __future__ import annotations

import itertools
import random

import pytest

from peftcli.config.errors import UserError
from peftcli.methods.rowcol.budget import Option, allocate, for_linear
from peftcli.methods.rowcol.maths import break_even

SHAPES = {"q": (32, 32), "up": (128, 32), "down": (32, 128), "thin": (8, 64)}


def layers(seed: int = 0) -> dict[str, list[Option]]:
    found = {}
    for place, (name, (outputs, inputs)) in enumerate(SHAPES.items()):
        fall = random.Random(seed + place).uniform(0.7, 0.99)
        found[name] = for_linear([fall**j for j in range(min(outputs, inputs))], outputs, inputs)
    return found


def size(option: Option) -> float:
    return 10**6 if option.rank is None else option.rank


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_kept_and_more_of_it_never_gives_a_layer_less(seed):
    options = layers(seed)
    least, whole = sum(found[0].cost for found in options.values()), sum(found[-1].cost for found in options.values())
    before = None
    for budget in range(int(least), int(whole) + 1, 37):
        chosen = allocate(options, budget)
        assert sum(one.cost for one in chosen.values()) <= budget
        assert chosen == allocate(options, budget)
        for name, (outputs, inputs) in SHAPES.items():
            rank = chosen[name].rank
            assert rank is None or rank * (outputs + inputs) < outputs * inputs
            assert rank is None or rank <= break_even(outputs, inputs)
            assert before is None or size(chosen[name]) >= size(before[name])
        before = chosen
    assert all(one.rank is None for one in allocate(options, whole).values())


def test_little_is_left_over():
    options = layers()
    for budget in range(2000, 9000, 501):
        spent = sum(one.cost for one in allocate(options, budget).values())
        assert budget - spent <= 2 * max(sum(shape) for shape in SHAPES.values())


def test_the_greedy_choice_is_the_best_where_its_last_step_fits():
    options = {name: found[:: max(1, len(found) // 4)] for name, found in layers().items()}
    steps = sorted({sum(one.cost for one in pick) for pick in itertools.product(*options.values())})
    for budget in steps[:: len(steps) // 40]:
        chosen = allocate(options, budget)
        gain, cost = sum(o.gain for o in chosen.values()), sum(o.cost for o in chosen.values())
        best = max(
            sum(o.gain for o in pick)
            for pick in itertools.product(*options.values())
            if sum(o.cost for o in pick) <= cost
        )
        assert gain >= 0.85 * best


def test_an_option_that_costs_more_and_keeps_less_is_not_taken():
    options = {"a": [Option(1, 1.0, 1.0), Option(2, 3.0, 0.5), Option(None, 4.0, 2.0)]}
    assert allocate(options, 3.5)["a"].rank == 1
    assert allocate(options, 4.0)["a"].rank is None


def test_a_layer_that_is_worth_more_gets_more():
    energies = [0.9**j for j in range(32)]
    options = {"a": for_linear(energies, 32, 32, weight=5.0), "b": for_linear(energies, 32, 32)}
    chosen = allocate(options, 900)
    assert size(chosen["a"]) > size(chosen["b"])


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(UserError, match="less than 456"):
        allocate(layers(), 455)
