"""How many terms each module gets, from its spectrum alone; no randomness, ties to the smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peftcli.config.errors import Mistake, UserError

Bound = Literal["energy", "elbow", "budget", "min_rank", "max_rank", "calibration", "rank"]


@dataclass(frozen=True)
class Rule:
    """As the settings of the same names. Raises UserError where `energy` is no share."""

    energy: float | None = None
    energy_of: Literal["weight", "candidates"] = "weight"
    elbow: Literal["chord", "curvature", "none"] = "chord"
    min_rank: int = 1
    max_rank: int = 32
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(Mistake(f"energy is {self.energy}, expected more than 0 and at most 1"))


@dataclass(frozen=True)
class Spectrum:
    """What the rule looks at.

    Attributes:
        sigma: Singular values of the candidates, falling.
        energy: Sum of the squares of all singular values of the weight.
        cost: Trained parameters of a term.
    """

    sigma: tuple[float, ...]
    energy: float
    cost: int


@dataclass(frozen=True)
class Cut:
    """How many terms are kept, and what decided it."""

    terms: int
    bound: Bound


def by_energy(spectrum: Spectrum, share: float, of: str = "weight") -> int | None:
    """Fewest terms with this share of the energy; None where all candidates have less."""
    squares = [sigma**2 for sigma in spectrum.sigma]
    whole = spectrum.energy if of == "weight" else sum(squares)
    held = 0.0
    for kept, square in enumerate(squares, start=1):
        held += square
        if held >= share * whole:
            return kept
    return None


def by_elbow(sigma: Sequence[float], kind: str = "chord") -> int:
    """Terms before the bend of a falling spectrum; all of them where there are fewer than three.

    The bend is the first term of the flat part: of the points (k / K, sigma_k / sigma_1) the one furthest below the
    line from the first to the last, or the one of largest second difference.
    """
    last = len(sigma) - 1
    if last < 2 or sigma[0] <= 0:
        return len(sigma)
    if kind == "chord":
        slope = (sigma[last] - sigma[0]) / last
        below = [sigma[0] + slope * k - sigma[k] for k in range(1, last)]
    else:
        below = [sigma[k - 1] - 2 * sigma[k] + sigma[k + 1] for k in range(1, last)]
    return 1 + max(range(len(below)), key=lambda k: (below[k], -k))


def by_thresholds(spectrum: Spectrum, rule: Rule) -> Cut:
    """The smaller of what energy and elbow say, within the rule's range; without `energy`, as many as there may be."""
    low, high = min(rule.min_rank, len(spectrum.sigma)), min(rule.max_rank, len(spectrum.sigma))
    if rule.energy is None:
        return Cut(high, "max_rank")
    found: list[tuple[int, Bound]] = [(high, "max_rank")]
    if (kept := by_energy(spectrum, rule.energy, rule.energy_of)) is not None:
        found.insert(0, (kept, "energy"))
    if rule.elbow != "none":
        found.insert(0, (by_elbow(spectrum.sigma[:high], rule.elbow), "elbow"))
    terms, bound = min(found, key=lambda pair: pair[0])
    return Cut(low, "min_rank") if terms < low else Cut(terms, bound)


def choose(spectra: Mapping[str, Spectrum], rule: Rule) -> dict[str, Cut]:
    """The terms of every module by the thresholds, and then within the budget.

    Raises:
        UserError: The budget does not give each module `min_rank` terms.
    """
    cuts = {name: by_thresholds(spectrum, rule) for name, spectrum in spectra.items()}
    return cuts if rule.budget is None else _spend(spectra, cuts, rule.budget, rule.min_rank)


def _spend(spectra: Mapping[str, Spectrum], cuts: Mapping[str, Cut], budget: int, least: int) -> dict[str, Cut]:
    """Take candidates by energy per parameter, sigma_k² / (energy of the weight x cost), until nothing more fits."""
    kept = {name: min(least, cut.terms) for name, cut in cuts.items()}
    left = budget - sum(spectra[name].cost * terms for name, terms in kept.items())
    if left < 0:
        what = f"method.budget={budget:,} is less than {least} term{'s' * (least > 1)} for each of {len(cuts)} modules"
        raise UserError(
            Mistake(what, "method.budget", hint=f"that takes {budget - left:,} parameters, or fewer targets")
        )
    offers = sorted(
        (-(sigma**2) / (max(spectrum.energy, 1e-300) * spectrum.cost), place, k, name)
        for place, (name, spectrum) in enumerate(spectra.items())
        for k, sigma in enumerate(spectrum.sigma[: cuts[name].terms])
        if k >= kept[name]
    )
    closed: set[str] = set()
    for *_, name in offers:
        if name in closed or spectra[name].cost > left:
            closed.add(name)
            continue
        kept[name] += 1
        left -= spectra[name].cost
    return {name: cut if kept[name] == cut.terms else Cut(kept[name], "budget") for name, cut in cuts.items()}
