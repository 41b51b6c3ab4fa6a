"""Which layers of a model are rebuilt, and with which ranks: the most worth within a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.contract import Calibration, shared
from peftcli.methods.rowcol import budget, convolution, costing, moments
from peftcli.methods.rowcol.budget import Option
from peftcli.methods.rowcol.costing import OUTSIDE, Cost
from peftcli.methods.rowcol.pairs import FUSED
from peftcli.methods.rowcol.rebuilding import Heads, Matrix, Rebuildable, Window
from peftcli.methods.rowcol.settings import Settings
from peftcli.models import roles
from peftcli.models.compact.layers import Tied
from peftcli.models.family import Family

READ_AS_THEY_ARE = {"ssm.dt": "Mamba reads its weight itself"}
WITHOUT_ROTARY = ("vit",)
"""Families in whose attention nothing stands between q and k."""
LOSS_BATCHES = 2
"""Calibration batches that the loss is measured on for each layer."""
LEAST_LOST = 1e-3
"""Share of its energy that a layer loses at least where its loss is measured, so that rounding is not worth much."""
LEAST_WORTH = 1e-2
"""Share of the largest worth that a layer has at least, whatever noise says."""


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer.

    Attributes:
        chosen: Ranks by module; empty where it stays as it is.
        worth: What all of a layer was worth, by module.
        cost: Of the whole backbone by this plan, in the target's unit.
    """

    chosen: dict[str, tuple[int, ...]]
    worth: dict[str, float]
    cost: float


def find(model: Any, family: Family, targets: Sequence[str]) -> tuple[list[Rebuildable], dict[str, str]]:
    """What can be rebuilt, in the model's order, and the layers that cannot, with why.

    Args:
        model: The model.
        family: Its family.
        targets: Roles or names to rebuild; empty takes all.

    Raises:
        UserError: There is nothing.
        CheckFailed: `dead-target`.
    """
    modules = dict(model.named_modules())
    asked = set(roles.resolve(model, family, targets)) if targets else set(modules)
    used_by_others = {id(module.source) for module in modules.values() if isinstance(module, Tied)}
    found: list[Rebuildable] = []
    left_out: dict[str, str] = {}
    taken: set[str] = set()
    for name, module in modules.items():
        if family.name in WITHOUT_ROTARY and _has_heads(module):
            four = {f"{name}.{one}_proj" for one in "qkvo"}
            if four <= asked and not any(id(modules[one]) in used_by_others for one in four):
                found.append(Heads(name, module))
                taken |= four
                continue
        inside_fused = isinstance(module, nn.MultiheadAttention)
        layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or inside_fused
        if not layer or name in taken or name not in asked or roles.role_of(name, family) in OUTSIDE:
            continue
        if why := _cannot(name, module, family, id(module) in used_by_others):
            left_out[name] = why
            taken |= {below for below in modules if below.startswith(f"{name}.")}
            continue
        kind = Window if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1) else Matrix
        if (thing := kind(name, module)).widest:
            found.append(thing)
    if not found:
        listed = "".join(f"; {name}: {why}" for name, why in left_out.items())
        raise UserError(Mistake(f"no layer of this model can be rebuilt smaller{listed}", "method.targets"))
    return found, left_out


def _has_heads(module: Any) -> bool:
    four: list[Any] = [getattr(module, f"{one}_proj", None) for one in "qkvo"]
    if not all(type(one) is nn.Linear for one in four) or not hasattr(module, "head_dim"):
        return False
    between = any(hasattr(module, one) for one in ("rotary_emb", "q_norm", "k_norm"))
    return not between and module.head_dim > 1 and len({one.out_features for one in four[:3]}) == 1


def _cannot(name: str, module: nn.Module, family: Family, is_shared: bool) -> str:
    """Why a layer stays as it is."""
    if is_shared:
        return "another layer uses its weight"
    if FUSED.fullmatch(name) or isinstance(module, nn.MultiheadAttention):
        return "several projections are fused in it"
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"a {type(module).__name__} has no plain weight"
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels > 1:
        return "each channel has its own filter"
    return READ_AS_THEY_ARE.get(roles.role_of(name, family), "") or convolution.cannot(module)


def look(model: nn.Module, things: Sequence[Rebuildable], settings: Settings, calibration: Calibration | None) -> None:
    """Let each find its ways, from calibration rows or from its weight alone.

    Raises:
        UserError: There are no calibration rows, or too few for the ranks that a layer could get.
        CheckFailed: What `moments.visit` says.
    """
    if settings.basis == "weight":
        for thing in things:
            thing.look(None)
        return
    if calibration is None:
        what = "method.basis=data looks at a calibration set, and there is none"
        raise UserError(Mistake(what, "method.basis", hint="method.basis=weight"))
    by_source = {thing.source: thing for thing in things}
    layers = {source: thing.layer for source, thing in by_source.items()}
    for source, moment in moments.visit(model, layers, calibration, settings.calibration_batches):
        thing = by_source[source]
        if moment.positions < thing.widest:
            what = (
                f"{thing.name} may get up to {thing.widest} directions, and the calibration rows have "
                f"{moment.positions} positions there, which show no more than that"
            )
            hint = "a larger method.calibration_batches, more training rows, or method.basis=weight"
            raise UserError(Mistake(what, "method.calibration_batches", hint=hint))
        thing.look(moment)


def plan(things: Sequence[Rebuildable], cost: Cost, share: float, worth: Mapping[str, float] | None = None) -> Plan:
    """Ranks of all layers: the most worth within a share of the backbone's cost.

    Args:
        things: That have looked.
        cost: The unit.
        share: Of `cost.whole`.
        worth: Of all of a layer, by module; as many as the maps it makes where not given.

    Raises:
        UserError: What stays, with the smallest ranks of the others, is more.
    """
    worth = worth or {thing.name: float(thing.maps) for thing in things}
    options: dict[str, list[Option]] = {}
    for thing in things:
        value, whole = worth[thing.name], cost.of(thing, ())
        found = [Option(i, cost.of(thing, way.ranks), value * way.kept) for i, way in enumerate(thing.ways)]
        options[thing.name] = [*(one for one in found if one.cost < whole), Option(None, whole, value)]
    budgeted = share * cost.whole - cost.held
    least = sum(min(one.cost for one in found) for found in options.values())
    if least > budgeted:
        floor = (cost.held + least) / cost.whole
        what = (
            f"{100 * share:.4g}% of the backbone is less than can be had: {cost.said(cost.held)} of "
            f"{cost.said(cost.whole)} stay as they are, and the smallest ranks of the rest make it {floor:.1%}"
        )
        hint = f"method.target.{cost.unit} well above {floor:.1%}, where each layer keeps a direction or few"
        if floor >= 1:
            hint = "another target: no layer of this model is faster in any smaller size here"
        raise UserError(Mistake(what, f"method.target.{cost.unit}", hint=hint))
    by_name = {thing.name: thing for thing in things}
    shared = budget.allocate(options, budgeted)
    chosen = {
        name: () if option.rank is None else by_name[name].ways[option.rank].ranks for name, option in shared.items()
    }
    return Plan(chosen, dict(worth), cost.held + sum(option.cost for option in shared.values()))


@torch.no_grad()
def sensitivities(model: nn.Module, things: Sequence[Rebuildable], calibration: Calibration) -> dict[str, float]:
    """What all of each layer is worth: how far the loss moves where half of the ranks go, per share of energy lost."""

    def loss() -> float:
        found = [
            sum(share * float(calibration.loss(model, micro_batch)) for micro_batch, share in shared(batch))
            for batch in islice(calibration.batches, LOSS_BATCHES)
        ]
        return sum(found) / max(1, len(found))

    was = model.training
    model.eval()
    before, found = loss(), {}
    for thing in things:
        simple = [way for way in thing.ways if len(way.ranks) == 1]
        way = simple[len(simple) // 2]
        changed = thing.cut(way.ranks)
        kept = [(parameter, parameter.detach().clone()) for parameter, _ in changed]
        for parameter, value in changed:
            parameter.copy_(value)
        # Where nothing was learnt yet, as with a new head, the loss may fall too: what moves it counts.
        found[thing.name] = abs(loss() - before) / max(1 - way.kept, LEAST_LOST)
        for parameter, value in kept:
            parameter.copy_(value)
    model.train(was)
    most = max(max(found.values()), torch.finfo(torch.float32).tiny)
    return {name: max(value, LEAST_WORTH * most) for name, value in found.items()}


def cost_of(
    unit: str, model: nn.Module, family: Family, things: Sequence[Rebuildable], calibration: Calibration | None
) -> Cost:
    """What a target counts in.

    Raises:
        UserError: It is measured on rows, and there are none.
    """
    if unit == "parameters":
        return costing.Parameters(model, family, things)
    if calibration is None or (batch := next(iter(calibration.batches), None)) is None:
        what = f"method.target.{unit} is measured on calibration rows, and there are none"
        raise UserError(Mistake(what, f"method.target.{unit}", hint="method.target.parameters=50%"))
    if unit == "flops":
        return costing.Operations(model, family, things, batch[0])
    return costing.Latency(model, things, batch[0])
