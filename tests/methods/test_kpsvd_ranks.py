"""Factor shapes, counts of parameters, and how many terms a spectrum is worth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftcli.config.errors import UserError
from peftcli.methods.kpsvd import ranks, shapes
from peftcli.methods.kpsvd.decomposition import leading
from peftcli.methods.kpsvd.maths import total
from peftcli.methods.kpsvd.ranks import Cut, Rule, Spectrum
from peftcli.methods.kpsvd.shapes import Split

LLAMA = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
LLAMA |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
falling = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20).map(lambda values: tuple(sorted(values)[::-1]))


def spectrum(*sigma: float, energy: float | None = None, cost: int = 10) -> Spectrum:
    return Spectrum(sigma, sum(s * s for s in sigma) if energy is None else energy, cost)


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((4096, 4096), (64, 64, 64, 64)),
        ((11008, 4096), (86, 64, 128, 64)),
        ((576, 576), (24, 24, 24, 24)),
        ((7, 5), (7, 1, 1, 5)),
    ],
)
def test_the_usual_factors_are_near_square(shape, split):
    assert shapes.square(*shape) == split


@given(st.integers(1, 400), st.integers(1, 400))
def test_every_shape_has_factors_and_none_are_smaller(rows, columns):
    found = shapes.square(rows, columns)
    assert (found.rows, found.columns) == (rows, columns)
    assert found.size <= shapes.thin(rows, columns).size


@pytest.mark.parametrize(
    ("targets", "plain", "with_sigma"),
    [("qv", 524_288, 524_352), ("qkvo", 1_048_576, 1_048_704), ("all", None, 2_363_616)],
)
def test_counts_on_llama_2_7b(targets, plain, with_sigma):
    names = list(LLAMA) if targets == "all" else list(targets)
    size = 32 * sum(shapes.square(*LLAMA[name]).size for name in names)
    assert plain in (None, size)
    assert size + 32 * len(names) == with_sigma


def test_the_papers_count_is_121_terms():
    split = shapes.square(4096, 4096)
    assert (121 * split.size, 121 * (split.size + 1)) == (991_232, 991_353)
    budget = 991_232
    modules = {f"{layer}.{name}": spectrum(*_slope(layer), cost=split.size) for layer in range(32) for name in "qv"}
    cuts = ranks.choose(modules, Rule(budget=budget))
    assert sum(cut.terms for cut in cuts.values()) == 121
    assert min(cut.terms for cut in cuts.values()) == 1
    # LoRA of rank 5 on one matrix a layer, and PiSSA of rank 128 on all of them.
    assert 32 * 5 * shapes.thin(4096, 4096).size == 1_310_720
    assert 32 * 128 * sum(shapes.thin(*shape).size for shape in LLAMA.values()) == 319_815_680


def _slope(layer: int) -> list[float]:
    return [1 / (k + 1) ** (0.5 + layer / 32) for k in range(8)]


@pytest.mark.parametrize(
    ("given_split", "said"),
    [
        ([64, 24, 64, 24], "m x p = 64 x 64 = 4096, and the weight has 576 rows"),
        ([24, 24, 24, 23], "n x q = 24 x 23 = 552, and the weight has 576 columns"),
        ([24, 24], "expected four whole numbers"),
        ([0, 24, 24, 24], "of 1 or more"),
    ],
)
def test_factors_of_another_shape_are_refused(given_split, said):
    with pytest.raises(UserError, match=r"method\.splits\.576x576") as caught:
        shapes.choose(576, 576, "square", {"576x576": given_split})
    assert said in str(caught.value)
    if given_split[0] == 64:
        assert "nearest factor pairs of 576: 64 x 9, 72 x 8, 48 x 12" in str(caught.value)


def test_planted_terms_are_found_by_both_criteria():
    split = Split(5, 4, 4, 5)
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    V = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    W = total(U, V) + 0.01 * torch.randn(20, 20, generator=generator, dtype=torch.float64)
    (found,) = leading([W], split, 12)
    seen = Spectrum(tuple(found.sigma.tolist()), found.energy, split.size)
    assert ranks.by_energy(seen, 0.99) == 3
    assert ranks.by_elbow(seen.sigma, "chord") == 3
    assert ranks.by_elbow(seen.sigma, "curvature") == 3


@given(falling, st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_more_energy_never_takes_fewer_terms(sigma, first, second):
    low, high = sorted((first, second))
    for of in ("weight", "candidates"):
        seen = spectrum(*sigma, energy=2 * sum(s * s for s in sigma))
        cuts = [ranks.by_thresholds(seen, Rule(energy=share, energy_of=of, elbow="none")) for share in (low, high)]
        assert cuts[0].terms <= cuts[1].terms


@given(falling, st.integers(1, 5), st.integers(5, 25), st.floats(0.01, 1.0))
def test_the_range_of_ranks_is_respected(sigma, low, high, energy):
    cut = ranks.by_thresholds(spectrum(*sigma), Rule(energy=energy, min_rank=low, max_rank=high))
    assert min(low, len(sigma)) <= cut.terms <= min(high, len(sigma))


def test_what_decided_is_named():
    seen = spectrum(10.0, 9.0, 8.0, 0.2, 0.1, 0.1)
    cases = {
        Rule(energy=0.3): Cut(1, "energy"),
        Rule(energy=0.999999): Cut(3, "elbow"),
        Rule(energy=0.3, min_rank=2): Cut(2, "min_rank"),
        Rule(energy=0.9999999, elbow="none", max_rank=4): Cut(4, "max_rank"),
        Rule(energy=1.0, elbow="none", energy_of="candidates"): Cut(6, "energy"),
    }
    assert {rule: ranks.by_thresholds(seen, rule) for rule in cases} == cases


def test_a_straight_spectrum_and_a_short_one_have_no_surprises():
    assert ranks.by_elbow([5.0, 4.0, 3.0, 2.0]) == 1
    assert ranks.by_elbow([5.0, 4.0]) == 2
    assert ranks.by_elbow([0.0, 0.0, 0.0]) == 3


def test_a_budget_is_spent_where_a_parameter_holds_most_energy():
    modules = {
        "steep": spectrum(10.0, 1.0, 0.5, cost=10),
        "flat": spectrum(5.0, 5.0, 5.0, cost=10),
        "dear": spectrum(10.0, 9.0, 1.0, cost=100),
    }
    cuts = ranks.choose(modules, Rule(budget=145))
    assert {name: cut.terms for name, cut in cuts.items()} == {"steep": 1, "flat": 3, "dear": 1}
    assert cuts["steep"].bound == "budget"
    assert cuts["flat"].bound == "max_rank"
    assert ranks.choose(modules, Rule(budget=150))["steep"].terms == 2
    tight = ranks.choose(modules, Rule(budget=10_000, energy=0.6, elbow="none"))
    assert tight["flat"] == Cut(2, "energy")


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.01, float("nan")])
def test_an_energy_that_is_no_share_is_refused(energy):
    with pytest.raises(UserError, match="expected more than 0 and at most 1"):
        Rule(energy=energy)


def test_a_budget_below_one_term_each_is_refused():
    with pytest.raises(UserError, match=r"method\.budget=15 is less than 1 term for each of 2 modules") as caught:
        ranks.choose({"a": spectrum(1.0), "b": spectrum(1.0)}, Rule(budget=15))
    assert "20 parameters" in str(caught.value)
