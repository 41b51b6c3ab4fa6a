"""Which terms each module starts with: the weights decomposed shape by shape, and the rank rule over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.kpsvd import ranks, shapes
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.decomposition import Terms, leading
from peftcli.methods.kpsvd.ranks import Cut, Spectrum
from peftcli.methods.kpsvd.shapes import Split

TOGETHER = 2**25
"""Entries of the weights that are decomposed at once; in float32 they take 128 MB, and their products as much again."""
SHOWN = 8
"""Terms beyond a fixed rank that are found too, so that the report shows where the cut lies."""
NEGLIGIBLE = 1e-6
"""Singular values below this share of the first are rounding: such terms do not exist."""


@dataclass(frozen=True)
class Start:
    """What a module starts with.

    Attributes:
        terms: Its candidates.
        cut: How many of them are kept, and why.
        kept: Places of these among the candidates, rising.
    """

    terms: Terms
    cut: Cut
    kept: tuple[int, ...]


def find(weights: Mapping[str, Tensor], config: KpsvdConfig) -> dict[str, Start]:
    """The start of every module.

    Args:
        weights: By module name, or what else is to be decomposed in their place; [O, I], or of a convolution
            [O, I, height, width].
        config: Of the adapter; `rank_pattern` goes before the rule.

    Raises:
        UserError: A weight has no contents or values that are not finite, its shape does not go with the splits, or
            it has fewer terms than are asked for.
    """
    splits = {name: split_of(shape, config) for name, shape in check(weights).items()}
    found: dict[str, Terms] = {}
    for split, names in _batches(splits):
        wanted = max(_candidates(config, name, split) for name in names)
        batch = [weights[name].flatten(1) for name in names]
        for name, terms in zip(names, leading(batch, split, wanted, config.seed, config.iterations), strict=True):
            found[name] = _existing(terms)
    cuts = _cuts({name: found[name] for name in weights}, config)
    return {name: Start(found[name], cut, tuple(range(cut.terms))) for name, cut in cuts.items()}


def check(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes; raises the errors of `find` about contents."""
    found = {}
    for name, weight in weights.items():
        if weight.is_meta:
            hint = "load the whole model before the adapter goes in, or set start='file' and load its factors"
            raise UserError(Mistake(f"{name} is on the meta device: it has no contents to decompose", hint=hint))
        if not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).sum())
            raise UserError(Mistake(f"{name} has {bad} of {weight.numel():,} values that are not finite"))
        found[name] = weight.shape
    return found


def split_of(shape: torch.Size, config: KpsvdConfig) -> Split:
    """The split of a weight of this shape; see `shapes.choose`."""
    return shapes.choose(shape[0], shape[1:].numel(), config.factors, config.splits)


def counted(splits: Mapping[str, Split], config: KpsvdConfig) -> dict[str, Cut]:
    """How many terms modules get as far as shapes alone say: a fixed rank, an even share of the budget, or the most.

    Raises:
        UserError: The budget is too small.
    """
    if config.rank != "auto":
        return {name: Cut(_wanted(config, name, split), "rank") for name, split in splits.items()}
    alike = {
        name: Spectrum(tuple(1 / (k + 1) for k in range(_wanted(config, name, split))), 1.0, cost(config, split))
        for name, split in splits.items()
    }
    found = ranks.choose(alike, replace(config.rule, energy=None))
    return {name: Cut(config.rank_pattern.get(name, cut.terms), cut.bound) for name, cut in found.items()}


def _wanted(config: KpsvdConfig, name: str, split: Split) -> int:
    """Terms of a module, or the most there may be."""
    if name in config.rank_pattern:
        return config.rank_pattern[name]
    return min(config.max_rank, split.terms) if config.rank == "auto" else int(config.rank)


def cost(config: KpsvdConfig, split: Split) -> int:
    """Trained parameters of a term."""
    return split.size + (config.sigma == "trained")


def _candidates(config: KpsvdConfig, name: str, split: Split) -> int:
    return _wanted(config, name, split) + (0 if config.rank == "auto" else SHOWN)


def _batches(splits: Mapping[str, Split]) -> Iterator[tuple[Split, list[str]]]:
    """Modules of one split together, as many as `TOGETHER` allows."""
    groups: dict[Split, list[str]] = defaultdict(list)
    for name, split in splits.items():
        groups[split].append(name)
    for split, names in groups.items():
        size = max(1, TOGETHER // (split.rows * split.columns))
        for at in range(0, len(names), size):
            yield split, names[at : at + size]


def _existing(terms: Terms) -> Terms:
    count = int((terms.sigma > NEGLIGIBLE * terms.sigma[0]).sum()) if terms.sigma[0] > 0 else 0
    return Terms(terms.U[:count], terms.V[:count], terms.sigma[:count], terms.energy)


def _cuts(found: Mapping[str, Terms], config: KpsvdConfig) -> dict[str, Cut]:
    for name, terms in found.items():
        wanted = config.rank_pattern.get(name, config.min_rank if config.rank == "auto" else config.rank)
        if wanted > len(terms.sigma):
            what = f"{name} has {len(terms.sigma)} Kronecker terms of these shapes, and {wanted} are asked for"
            raise UserError(Mistake(what, hint="a lower rank, other factor shapes, or other targets"))
    if config.rank != "auto":
        return {name: Cut(config.rank_pattern.get(name, config.rank), "rank") for name in found}
    spectra = {
        name: Spectrum(tuple(terms.sigma.tolist()), terms.energy, cost(config, terms.split))
        for name, terms in found.items()
    }
    chosen = ranks.choose(spectra, config.rule)
    return {
        name: Cut(config.rank_pattern[name], "rank") if name in config.rank_pattern else chosen[name] for name in found
    }
