"""What a step of SMAT's training lowers on a task. N rows, C classes, D features, M experts.

One first-order step on the support, then the query; a dense teacher that has seen the query; the sparsity constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.methods.episodes import prototypes, scores

Weights = dict[str, Tensor]
Features = Callable[[Mapping[str, Tensor], Weights], Tensor]
"""Features [N, D] of inputs under given weights."""


def descend(loss: Tensor, weights: Weights, heads_CD: Tensor, rate: float, keep: bool) -> tuple[Weights, Tensor]:
    """One step of gradient descent on weights and prototypes; first order: the gradient is a constant.

    Args:
        loss: A scalar, of weights and prototypes.
        weights: By name.
        heads_CD: The prototypes, a leaf.
        rate: Of the step.
        keep: Whether the loss's graph is needed again.

    Returns:
        The moved ones, which still learn as the weights did.
    """
    gradients = torch.autograd.grad(loss, [*weights.values(), heads_CD], retain_graph=keep, allow_unused=True)
    *of_weights, of_heads = gradients
    moved = {
        name: weight if gradient is None else torch.add(weight, gradient, alpha=-rate)
        for (name, weight), gradient in zip(weights.items(), of_weights, strict=True)
    }
    assert of_heads is not None
    return moved, torch.add(heads_CD, of_heads, alpha=-rate)


def after_support(
    features: Features, weights: Weights, inputs: Mapping[str, Tensor], classes_N: Tensor, ways: int, rate: float
) -> tuple[Weights, Tensor]:
    """Weights and prototypes after one step on the support; the prototypes learn through its features.

    Args:
        features: The model.
        weights: Of the task.
        inputs: The support's.
        classes_N: The support's.
        ways: C.
        rate: Of the step; 0 takes none.
    """
    support_ND = features(inputs, weights)
    means_CD = prototypes(support_ND, classes_N, ways)
    if rate == 0:
        return weights, means_CD
    heads_CD = means_CD.detach().requires_grad_()
    loss = F.cross_entropy(scores(support_ND, heads_CD), classes_N)
    moved, heads_CD = descend(loss, weights, heads_CD, rate, keep=True)
    return moved, heads_CD.detach() + means_CD - means_CD.detach()


def dense_teacher(
    features: Features,
    query_ND: Tensor,
    weights: Weights,
    heads_CD: Tensor,
    inputs: Mapping[str, Tensor],
    classes_N: Tensor,
    steps: int,
    rate: float,
) -> Tensor:
    """Scores of the query [N, C] by a copy that all weights of were moved on that very query.

    Args:
        features: The model.
        query_ND: Its features of the query under `weights`, with their graph, which stays: the first step needs no
            forward pass of its own.
        weights: Of the task.
        heads_CD: Its prototypes.
        inputs: The query's.
        classes_N: The query's.
        steps: How often it is moved.
        rate: Of each step.
    """
    own, first = weights, True
    for _ in range(steps):
        heads_CD = heads_CD.detach().requires_grad_()
        if not first:
            own = {name: weight.requires_grad_() for name, weight in own.items()}
        with torch.enable_grad():
            answer_ND = query_ND if first else features(inputs, own)
            loss = F.cross_entropy(scores(answer_ND, heads_CD), classes_N)
        moved, heads_CD = descend(loss, own, heads_CD, rate, keep=first)
        own, first = {name: weight.detach() for name, weight in moved.items()}, False
    with torch.no_grad():
        return scores(features(inputs, own), heads_CD)
