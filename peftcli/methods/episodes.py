"""Few-shot tasks as a model sees them, and the head that needs no training: the mean feature of each class.

N rows of a task, C classes, D features.

    p_c = mean of f(x) over the support rows of class c          score of c for x: 10 cos(f(x), p_c)

A method whose weights depend on the task has a model with `for_support` and, where its training is more than the loss
on the query, `episode_loss`; every other model is used as it is, which trained is dense meta-tuning.

Sources: prototypical networks (Snell et al., 2017); cosine head and pre-trained backbones: PMF (Hu et al., CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 10.0
"""Of the cosine."""
AT_ONCE = 256
"""Rows of a support set that go through the model together where nothing is learnt."""


@dataclass(frozen=True)
class Episode:
    """A task.

    Attributes:
        inputs: Arguments of the model's forward pass, of the support and then of the query, [N, ...] each.
        classes_N: Class of each row, 0 to C - 1, int64.
        support: How many of the rows are the support.
        ways: C.
        domain: Where it comes from.
        base_ND: Features of the rows by the untouched base, where somebody has kept them.
    """

    inputs: Mapping[str, Tensor]
    classes_N: Tensor
    support: int
    ways: int
    domain: str = ""
    base_ND: Tensor | None = None

    def part(self, query: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and classes of the query, or of the support."""
        rows = slice(self.support, None) if query else slice(self.support)
        return {name: value[rows] for name, value in self.inputs.items()}, self.classes_N[rows]


def prototypes(features_ND: Tensor, classes_N: Tensor, ways: int) -> Tensor:
    """The mean feature of each class [C, D]; every class has a row.

    Args:
        features_ND: Of the support.
        classes_N: Theirs.
        ways: C.
    """
    member_CN = F.one_hot(classes_N, ways).T.to(features_ND.dtype)
    with exactly(features_ND):
        return (member_CN / member_CN.sum(1, keepdim=True)) @ features_ND


def scores(features_ND: Tensor, prototypes_CD: Tensor) -> Tensor:
    """Ten times the cosine of each row with each prototype [N, C]."""
    with exactly(features_ND):
        return SCALE * F.normalize(features_ND, dim=1) @ F.normalize(prototypes_CD, dim=1).T


def exactly(features_ND: Tensor) -> AbstractContextManager:
    """Arithmetic in the features' own type: in half precision cosines would tie."""
    return torch.autocast(features_ND.device.type, enabled=False)


def wide(features: Tensor) -> Tensor:
    """At least float32, as `exactly` needs them."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def in_parts(features: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Features of many rows [N, D], so many at once as fit beside a model anywhere."""
    rows = len(next(iter(inputs.values())))
    parts = ({name: value[at : at + AT_ONCE] for name, value in inputs.items()} for at in range(0, rows, AT_ONCE))
    return torch.cat([features(part) for part in parts])


def adapted(model: Any, inputs: Mapping[str, Tensor], classes_N: Tensor, ways: int) -> AbstractContextManager:
    """Within it the model has the weights of the task with this support, where they depend on it."""
    own = getattr(model, "for_support", None)
    return nullcontext() if own is None else own(inputs, classes_N, ways)


def logits(model: Any, episode: Episode) -> Tensor:
    """Scores of the query rows [N, C], at least float32.

    Args:
        model: Without a wrapper for several processes, and without a head.
        episode: The task.
    """
    inputs, classes_N = episode.part(query=False)
    with adapted(model, inputs, classes_N, episode.ways):
        features_ND = wide(model(**episode.inputs).logits)
    means_CD = prototypes(features_ND[: episode.support], classes_N, episode.ways)
    return scores(features_ND[episode.support :], means_CD)


def loss(model: nn.Module, episode: Episode) -> Tensor:
    """What a step of training lowers on a task, a scalar: by default the mean cross-entropy of the query."""
    own = getattr(getattr(model, "module", model), "episode_loss", None)
    if own is not None:
        return own(episode)
    features_ND = wide(model(**episode.inputs).logits)
    (_, classes_N), (_, truth_N) = episode.part(query=False), episode.part(query=True)
    means_CD = prototypes(features_ND[: episode.support], classes_N, episode.ways)
    return F.cross_entropy(scores(features_ND[episode.support :], means_CD), truth_N)
