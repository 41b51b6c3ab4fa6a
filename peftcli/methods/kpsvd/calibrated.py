"""Ranks chosen by what the model's loss says: the cheapest thresholds without whose other terms it hardly grows.

Every setting of the thresholds leaves some candidate terms out. The loss on a few calibration rows is measured with
those terms dropped from the weights, cheapest setting first, and the first that stays within the bound is taken. What
is dropped only for the measurement stays in the frozen weight; what matters least to the loss need not be trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftcli.config.errors import CheckFailed
from peftcli.methods.contract import Loss
from peftcli.methods.kpsvd import ranks
from peftcli.methods.kpsvd.layer import KpsvdLayer
from peftcli.methods.kpsvd.ranks import Cut, Rule, Spectrum
from peftcli.methods.kpsvd.start import Start

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Thresholds that are tried: shares of the candidates' energy."""
ADAPTER = "default"
Batches = Sequence[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Chosen:
    """The cuts, and what was measured on the way to them."""

    cuts: dict[str, Cut]
    notes: list[str]


def choose(model: Any, batches: Batches, loss: Loss, starts: Mapping[str, Start], rule: Rule, bound: float) -> Chosen:
    """The cheapest setting within the bound.

    Args:
        model: With all candidates in its layers, as `attach` puts them there.
        batches: Of the calibration rows.
        loss: The mean loss of a model on a batch.
        starts: Where the modules started.
        rule: Its range of ranks, and the kind of elbow that is tried beside the shares.
        bound: Largest increase of the loss, as a share of it.

    Raises:
        CheckFailed: `non-finite-loss`, on the calibration rows.
    """
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, KpsvdLayer)}
    spectra = {name: _spectrum(layers[name], found) for name, found in starts.items()}
    base = _mean(model, batches, loss)
    notes = [f"calibration loss of the base {base:.4f}; up to {base * (1 + bound):.4f} is allowed"]
    for what, cuts in _settings(spectra, rule):
        terms = {name: cut.terms for name, cut in cuts.items()}
        parameters = sum(spectra[name].cost * kept for name, kept in terms.items())
        if all(terms[name] == len(start.terms.sigma) for name, start in starts.items()):
            found = base
        else:
            with _without(layers, terms):
                found = _mean(model, batches, loss)
        notes.append(f"{what}: {sum(terms.values())} terms, {parameters:,} parameters, loss {found:.4f}")
        if found <= base * (1 + bound):
            break
    notes.append(f"chose {what}, the cheapest whose loss grows by at most {bound:.1%}")
    return Chosen({name: Cut(cut.terms, "calibration") for name, cut in cuts.items()}, notes)


def _spectrum(layer: KpsvdLayer, found: Start) -> Spectrum:
    cost = found.terms.split.size + (ADAPTER in layer.kpsvd_S)
    return Spectrum(tuple(found.terms.sigma.tolist()), found.terms.energy, cost)


def _settings(spectra: Mapping[str, Spectrum], rule: Rule) -> Iterator[tuple[str, dict[str, Cut]]]:
    """Thresholds with their cuts, cheapest first; the last keeps all candidates."""
    rules = {f"energy={share:g} of the candidates": replace(rule, energy=share, elbow="none") for share in SHARES}
    if rule.elbow != "none":
        rules[f"elbow={rule.elbow}"] = replace(rule, energy=1.0)
    found = {
        what: ranks.choose(spectra, replace(each, energy_of="candidates", budget=None)) for what, each in rules.items()
    }
    price = {what: sum(spectra[name].cost * cut.terms for name, cut in cuts.items()) for what, cuts in found.items()}
    yield from sorted(found.items(), key=lambda pair: price[pair[0]])


@torch.no_grad()
def _mean(model: Any, batches: Batches, loss: Loss) -> float:
    training = model.training
    model.eval()
    try:
        losses = [float(loss(model, batch)) for batch in batches]
    finally:
        model.train(training)
    mean = sum(losses) / len(losses)
    if mean != mean or mean == float("inf"):
        raise CheckFailed("non-finite-loss", f"the loss on the calibration rows is {mean}", "look at the base model")
    return mean


@contextmanager
def _without(layers: Mapping[str, KpsvdLayer], terms: Mapping[str, int]) -> Iterator[None]:
    """Within it the terms beyond those counted are dropped from the weights."""
    factors = {name: layer.kpsvd_U[ADAPTER].data for name, layer in layers.items()}
    before = {name: factor.clone() for name, factor in factors.items()}
    try:
        for name, factor in factors.items():
            factor[terms[name] :] = 0
        yield
    finally:
        for name, factor in factors.items():
            factor.copy_(before[name])
