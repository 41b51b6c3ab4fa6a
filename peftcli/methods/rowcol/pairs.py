"""Which maps of a model can share a matrix, and what that matrix starts as.

| part | matrix | used again by |
| --- | --- | --- |
| `attention` | q, k | o as qᵀ, v as kᵀ |
| `mlp` | up | down as upᵀ |
| `conv` | the narrowing 1x1 convolution of a bottleneck | the widening one, transposed |
| `stage` | that of a stage's first block that fits | all others of the stage |

Letters: H hidden units (rows of the shared matrix), D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.methods.rowcol import maths, tying
from peftcli.models.family import Family

USUAL = {"vit": ("attention", "mlp"), "llama": ("mlp",), "resnet": ("conv",)}
"""Parts that are tied where the recipe names none; attention of LLaMA often is not square."""
ROLES = {
    "attention": (("attention.q", "attention.o"), ("attention.k", "attention.v")),
    "mlp": (("mlp.up", "mlp.down"),),
    "conv": (("conv.reduce", "conv.expand"),),
    "stage": (("conv.reduce", "conv.expand"),),
}
FUSED = re.compile(r"(?:.*\.)?(?:qkv|c_attn|qkv_proj|query_key_value|Wqkv|in_proj_weight|gate_up_proj)")


@dataclass(frozen=True)
class Use:
    """Another layer that takes the matrix."""

    name: str
    transposed: bool


@dataclass(frozen=True)
class Group:
    """Layers of one matrix.

    Attributes:
        kind: The part of the model.
        source: The layer that keeps the matrix.
        uses: The others.
        gated: Whether it is an MLP with a gate, so that nothing but a product stands between the two.
    """

    kind: str
    source: str
    uses: tuple[Use, ...]
    gated: bool = False

    @property
    def names(self) -> list[str]:
        """All of them, the source first."""
        return [self.source, *(use.name for use in self.uses)]


def find(model: nn.Module, family: Family, targets: Sequence[str]) -> tuple[list[Group], dict[str, str]]:
    """The groups of the parts that a recipe asks for, and layers that are left out, with why.

    Raises:
        UserError: An unknown part, one that the model does not have, an attention that is not square, or projections
            that are fused.
    """
    chosen = list(targets) or list(USUAL.get(family.name, ()))
    if strange := [part for part in chosen if part not in ROLES]:
        raise UserError(*(unknown("part to tie", part, ROLES, "method.targets") for part in strange))
    groups: list[Group] = []
    left_out: dict[str, str] = {}
    for part in chosen:
        if part == "conv" and "stage" in chosen:
            continue
        found = _pairs(model, family, part, left_out)
        groups += _stages(found, model) if part == "stage" else found
    if not groups:
        fused = [name for name, _ in model.named_modules() if FUSED.fullmatch(name)]
        what = f"nothing of this model can be tied ({', '.join(chosen) or family.name})"
        if fused:
            what += f": its projections are fused into one matrix, as {fused[0]}"
        there = [part for part, pairs in ROLES.items() if any(up in family.roles for up, _ in pairs)]
        hint = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:2])
        if not hint and not fused and there:
            hint = f"what it has: {', '.join(there)}"
        raise UserError(Mistake(what, "method.targets", hint=hint))
    return groups, left_out


def _pairs(model: nn.Module, family: Family, part: str, left_out: dict[str, str]) -> list[Group]:
    names = [name for name, _ in model.named_modules()]
    groups = []
    for up_role, down_role in ROLES[part]:
        if up_role not in family.roles:
            continue
        ups, downs = ([n for n in names if family.pattern(role).fullmatch(n)] for role in (up_role, down_role))
        gates = [n for n in names if "mlp.gate" in family.roles and family.pattern("mlp.gate").fullmatch(n)]
        for up, down in zip(ups, downs, strict=False):
            if why := _misfit(model, part, up, down):
                left_out[down] = why
                continue
            gated = any(_parent(one) == _parent(up) for one in gates)
            groups.append(Group(part, up, (Use(down, True),), gated))
    return groups


def _misfit(model: nn.Module, part: str, up: str, down: str) -> str:
    """Why a pair is left out; empty where it fits.

    Raises:
        UserError: An attention that is not square.
    """
    first, second = (_shape(model, name) for name in (up, down))
    if part == "attention" and not first == second == (first[0], first[0]):
        what = f"{up} is {_told(first)} and {down} {_told(second)}, and attention can be tied where all are square"
        raise UserError(Mistake(what, "method.targets", hint="method.targets=[mlp]"))
    layers = [model.get_submodule(name) for name in (up, down)]
    if any(isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups > 1) for layer in layers):
        return "it is no 1x1 convolution"
    if first != second[::-1]:
        return f"{_told(second)} is not the transpose of {_told(first)}"
    return ""


def _stages(pairs: list[Group], model: nn.Module) -> list[Group]:
    """The pairs of a stage as one group, as far as they are of one shape."""
    stages: dict[tuple[Any, ...], list[Group]] = {}
    for pair in pairs:
        stage = pair.source.partition(".layers.")[0]
        stages.setdefault((stage, _shape(model, pair.source)), []).append(pair)
    return [
        Group(
            "stage",
            found[0].source,
            (*found[0].uses, *(use for one in found[1:] for use in (Use(one.source, False), *one.uses))),
        )
        for found in stages.values()
    ]


@dataclass(frozen=True)
class Filling:
    """What a group starts as.

    Attributes:
        weight: [H, D].
        bias: Factors of the source's bias [H].
        norms: Factors of weight and bias of BatchNorms [H], by name.
        diagonals: s [H] of layers, by name.
        error: Mean `tying.tie_error` before, after the rescaling.
    """

    weight: Tensor
    bias: Tensor
    norms: dict[str, Tensor]
    diagonals: dict[str, Tensor]
    error: float

    def put(self, model: Any, group: Group, old: Mapping[str, Any]) -> None:
        """Fill the tied model's tensors.

        Args:
            model: After `compacted`.
            group: The group.
            old: Its layers before, for their biases.
        """
        source = model.get_submodule(group.source)
        source.weight.copy_(self.weight.view_as(source.weight))
        if source.bias is not None:
            source.bias.mul_(self.bias.to(source.bias))
        for name, scale_H in self.norms.items():
            norm = model.get_submodule(name)
            for tensor in (norm.weight, norm.bias):
                tensor.mul_(scale_H.to(tensor))
        for use in group.uses:
            layer = model.get_submodule(use.name)
            if layer.bias is not None:
                layer.bias.copy_(old[use.name].bias)
            if layer.diagonal is not None:
                layer.diagonal.copy_(self.diagonals[use.name])


def fill(model: Any, group: Group, diagonal: bool) -> Filling:
    """The matrix in the middle of a group's, after what may be rescaled without changing the function."""
    up_HD = maths.wide(model.get_submodule(group.source).weight).flatten(1)
    others = {use.name: maths.wide(model.get_submodule(use.name).weight).flatten(1) for use in group.uses}
    bias_H, norms = _rescale(model, group, up_HD, others)
    up_HD = bias_H[:, None] * up_HD
    members = [up_HD, *(others[use.name].mT if use.transposed else others[use.name] for use in group.uses)]
    W_HD, diagonals = torch.stack(members).mean(0), {}
    if diagonal and len(members) == 2:
        W_HD, s_H = tying.with_diagonal(up_HD, others[group.uses[0].name])
        diagonals[group.uses[0].name] = s_H
    elif diagonal:
        size_H = W_HD.square().sum(1).clamp_min(1e-30)
        diagonals = {use.name: (W_HD * others[use.name].mT).sum(1) / size_H for use in group.uses if use.transposed}
    errors = [tying.tie_error(up_HD, one.mT) for one in members[1:]]
    return Filling(W_HD, bias_H, norms, diagonals, sum(errors) / len(errors))


def _rescale(model: Any, group: Group, up_HD: Tensor, others: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Make the sides of each pair equally long: `others` in place, and factors of the source and of BatchNorms.

    A ReLU lets a unit's size move from one side to the other, and so does a gated MLP; in a bottleneck the BatchNorm
    before the widening convolution takes up what is divided out of that.
    """
    scale_H, norms = torch.ones(len(up_HD), dtype=torch.float64, device=up_HD.device), {}
    relu = getattr(model.config, "hidden_act", "") == "relu"
    if group.kind == "mlp" and (relu or group.gated):
        down = group.uses[0].name
        scale_H = tying.balance(up_HD, others[down])
        others[down] = others[down] / scale_H
    if group.kind in ("conv", "stage") and relu:
        for use in group.uses:
            if use.transposed:
                size_H = tying.balance(up_HD, others[use.name]).square()
                others[use.name] = others[use.name] / size_H
                norms[_norm_before(use.name)] = size_H
    return scale_H, norms


def _norm_before(name: str) -> str:
    """BatchNorm of the convolution before a bottleneck's widening one."""
    path, _, _ = name.rpartition(".layer.")
    return f"{path}.layer.1.normalization"


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    weight: Any = model.get_submodule(name).weight
    return tuple(weight.shape[:2])


def _told(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
