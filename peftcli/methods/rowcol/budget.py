"""A budget shared out over layers, greedily by gain per cost.

Of each layer's options only those on the upper hull of gain over cost are worth taking in turn, so that going from one
to the next pays less and less. The steps of all layers stand in one sequence, the best-paid first, and a budget takes a
prefix of it, and of the step that no longer fits whole the best option inside it. A larger budget therefore never gives
a layer less, and the sum never exceeds the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.rowcol.maths import break_even


@dataclass(frozen=True)
class Option:
    """One way to have a layer.

    Attributes:
        rank: Of its factors, or the place of one of its ways where they have several ranks; None leaves it as it is.
        cost: In what the budget counts: parameters, operations, seconds.
        gain: What it keeps; in one unit for all layers.
    """

    rank: int | None
    cost: float
    gain: float


def for_linear(energies: Sequence[float], outputs: int, inputs: int, weight: float = 1.0) -> list[Option]:
    """Options of a matrix [O, I] by its number of parameters: each rank below break-even, then the matrix itself.

    Args:
        energies: Of its directions, falling; an option keeps its share of them.
        outputs: O.
        inputs: I.
        weight: What the layer as a whole is worth.
    """
    whole = sum(energies) or 1.0
    options, held = [], 0.0
    for rank, energy in enumerate(energies[: break_even(outputs, inputs)], start=1):
        held += energy
        options.append(Option(rank, rank * (outputs + inputs), weight * held / whole))
    return [*options, Option(None, outputs * inputs, weight)]


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Option]:
    """An option for each layer, together within the budget; no randomness, ties to the earlier layer.

    Args:
        options: By layer, in any order; one that costs more than another and keeps no more is never taken.
        budget: Of all layers together.

    Raises:
        UserError: The cheapest option of each layer is more than the budget.
    """
    paying = {name: _paying(found) for name, found in options.items()}
    least = sum(found[0].cost for found in paying.values())
    if least > budget:
        what = f"the budget of {budget:,.6g} is less than {least:,.6g}, which {len(paying)} layers take at least"
        raise UserError(Mistake(what, hint="a larger budget, or fewer layers"))
    chosen = {name: found[0] for name, found in paying.items()}
    left = budget - least
    for name, start, end in _steps(paying):
        if end.cost - start.cost > left:
            inside = [one for one in paying[name] if start.cost <= one.cost <= start.cost + left]
            chosen[name] = inside[-1]
            break
        chosen[name] = end
        left -= end.cost - start.cost
    return chosen


def _paying(options: Sequence[Option]) -> list[Option]:
    """Those that keep more than every cheaper one, by cost."""
    found: list[Option] = []
    for option in sorted(options, key=lambda one: (one.cost, -one.gain)):
        if not found or option.gain > found[-1].gain:
            found.append(option)
    return found


def _steps(paying: Mapping[str, Sequence[Option]]) -> list[tuple[str, Option, Option]]:
    """Every layer's steps along its hull, best-paid first."""
    order = {name: place for place, name in enumerate(paying)}
    steps = [(name, *step) for name, found in paying.items() for step in pairwise(_hull(found))]
    return sorted(steps, key=lambda step: (-_slope(step[1], step[2]), order[step[0]], step[1].cost))


def _hull(options: Sequence[Option]) -> list[Option]:
    found: list[Option] = []
    for option in options:
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-1], option):
            found.pop()
        found.append(option)
    return found


def _slope(start: Option, end: Option) -> float:
    return (end.gain - start.gain) / (end.cost - start.cost)
