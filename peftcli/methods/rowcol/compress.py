"""The mode `compress`: a smaller model of the spaces that the original uses, at a target, and trained as a whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.config import targets
from peftcli.config.errors import Mistake, UserError
from peftcli.methods import whole
from peftcli.methods.contract import Calibration, Form, Found
from peftcli.methods.distillation import Distilled, blocks_of
from peftcli.methods.rowcol import costing, moments, planning, usage
from peftcli.methods.rowcol.costing import Cost, Latency
from peftcli.methods.rowcol.planning import Plan
from peftcli.methods.rowcol.rebuilding import Rebuildable
from peftcli.methods.rowcol.settings import Settings
from peftcli.models.compact.parts import Part
from peftcli.models.compact.registered import compacted
from peftcli.models.family import Family

NAMED = 4
"""Layers left out that a note names."""


class Compress(Distilled):
    """Rebuilds a model smaller and trains it whole."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._original: Any = None
        self._found: Found | None = None
        self._parts: dict[str, Part] = {}
        self._figures: list[dict[str, Any]] = []

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """See the contract. What was found in this run before is taken again; on the meta device shapes alone decide.

        Raises:
            UserError: A mistaken target or one that cannot be reached, nothing to rebuild, or too few calibration rows.
            CheckFailed: `dead-target`; what `moments.visit` says.
        """
        unit, share = targets.read(self.settings.target)
        self._original = copy.deepcopy(model).eval()
        blocks = blocks_of(model, family)
        model = self._smaller(model, family, calibration, unit, share)
        self.taught_by(model, self._original, blocks)
        return model

    def _smaller(
        self, model: nn.Module, family: Family, calibration: Calibration | None, unit: str, share: float
    ) -> nn.Module:
        self._found = calibration.found if calibration else None
        if kept := self._found.read() if self._found else None:
            plain, tensors = kept
            self._parts, self._figures = plain["parts"], plain["figures"]
            self.notes += plain["notes"]
            model = compacted(model, self._parts)
            _trained_whole(model, family)
            _put(model, tensors)
            return model
        things, left_out = planning.find(model, family, self.settings.targets)
        if next(model.parameters()).is_meta:
            return self._outlined(model, family, things, unit, share)
        if self.settings.prune:
            self.notes.append(_prune(things, self.settings.prune))
        planning.look(model, things, self.settings, calibration)
        cost = planning.cost_of(unit, model, family, things, calibration)
        worth = None
        if self.settings.worth == "sensitivity":
            worth = planning.sensitivities(model, things, _needed(calibration))
        plan = planning.plan(things, cost, share, worth)
        before = costing.backbone(model, family)
        model = self._rebuilt(model, things, plan, calibration)
        _trained_whole(model, family)
        self._tell(things, plan, cost, before, costing.backbone(model, family), left_out)
        if self._found:
            plain = {"parts": self._parts, "figures": self._figures, "notes": self.notes}
            plain |= {"latency": cost.table} if isinstance(cost, Latency) else {}
            self._found.write(plain, _tensors(model))
        return model

    def _outlined(
        self, model: nn.Module, family: Family, things: Sequence[Rebuildable], unit: str, share: float
    ) -> nn.Module:
        """The model's shapes at this share of parameters, with ranks as if energies fell alike everywhere."""
        for thing in things:
            thing.sketch()
        plan = planning.plan(things, costing.Parameters(model, family, things), share)
        self._parts = {thing.name: thing.part(r) for thing in things if (r := plan.chosen[thing.name])}
        told = "" if unit == "parameters" else f", and method.target.{unit} as if it were of parameters"
        self.notes.append(f"method.mode=compress is counted with ranks that shapes alone suggest{told}")
        model = compacted(model, self._parts)
        _trained_whole(model, family)
        return model

    def _rebuilt(
        self, model: nn.Module, things: Sequence[Rebuildable], plan: Plan, calibration: Calibration | None
    ) -> nn.Module:
        smaller = {thing.name: thing for thing in things if plan.chosen[thing.name]}
        filled = dict(self._filling(model, smaller, plan, calibration))
        self._parts = {name: thing.part(plan.chosen[name]) for name, thing in smaller.items()}
        model = compacted(model, self._parts)
        for name, tensors in filled.items():
            module = model.get_submodule(name)
            module.float()
            module.load_state_dict(tensors)
        return model

    def _filling(
        self, model: nn.Module, smaller: Mapping[str, Rebuildable], plan: Plan, calibration: Calibration | None
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The tensors of each new module; those of several inner ranks look at the data once more."""
        again = {n: thing for n, thing in smaller.items() if len(plan.chosen[n]) > 1 and self.settings.basis == "data"}
        for name, thing in smaller.items():
            if name not in again:
                yield name, thing.tensors(plan.chosen[name], None)
        if again:
            layers = {name: thing.layer for name, thing in again.items()}
            batches = self.settings.calibration_batches
            for name, moment in moments.visit(model, layers, _needed(calibration), batches):
                yield name, again[name].tensors(plan.chosen[name], moment)

    def _tell(
        self,
        things: Sequence[Rebuildable],
        plan: Plan,
        cost: Cost,
        before: int,
        after: int,
        left_out: dict[str, str],
    ) -> None:
        """Notes and figures."""
        smaller = [thing for thing in things if plan.chosen[thing.name]]
        what = f"the backbone has {after:,} of {before:,} parameters ({after / before:.1%})"
        if cost.unit != "parameters":
            what += f" and takes {cost.said(plan.cost)} of {cost.said(cost.whole)} ({plan.cost / cost.whole:.1%})"
        self.notes.append(
            f"{what}: {len(smaller)} of {len(things)} layers are rebuilt; embeddings, norms, biases and the head stay"
        )
        if left_out:
            listed = [f"{name}: {why}" for name, why in list(left_out.items())[:NAMED]]
            more = f"; and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
            self.notes.append(f"not rebuilt: {'; '.join(listed)}{more}")
        used = [thing.usage for thing in things if thing.usage]
        mean = usage.mean_layer_utilisation(used)
        of = "outputs and inputs on data" if self.settings.basis == "data" else "weights"
        self.notes.append(
            f"mean layer utilisation {mean:.1%}: directions that hold {1 - usage.EPS:.0%} of the energy of {of}"
        )
        self._figures = _figures(things, plan)

    def at_start(self, model: nn.Module) -> AbstractContextManager[nn.Module] | None:
        """As it was rebuilt."""
        return _as_before(model, self._found) if self._found else None

    def forms(self, model: nn.Module) -> list[Form]:
        """The original's modules in the place of the rebuilt ones; the model as it is."""
        outermost = [name for name in self._parts if not any(name.startswith(f"{one}.") for one in self._parts)]
        return whole.beside_original({name: self._original.get_submodule(name) for name in outermost}, "compressed")

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """How much of its spaces each layer uses, and what is left of it."""
        return self._figures


def _figures(things: Sequence[Rebuildable], plan: Plan) -> list[dict[str, Any]]:
    places = list(range(len(things)))
    axis = "layer, from input to output"
    used = [thing.usage for thing in things if thing.usage]
    shares = [[one.row for one in used], [one.column for one in used], [one.both for one in used]]
    ranks = [plan.chosen[thing.name] for thing in things]
    left = [thing.parameters(r) / thing.parameters(()) for thing, r in zip(things, ranks, strict=True)]
    series = ["row space", "column space", "both"]
    names = [thing.name for thing in things]
    return [
        {
            "title": "Used directions of each layer",
            "caption": (
                f"Directions that hold {1 - usage.EPS:.0%} of the energy, as a share of all; both: the fewer of "
                "the two, as a share of the layer's smaller side."
            ),
            "x": places,
            "y": shares,
            "labels": {"x": axis, "y": "share of directions", "series": series},
            "names": names,
        },
        {
            "title": "What is left of each layer",
            "x": places,
            "y": [left],
            "labels": {"x": axis, "y": "share of its parameters"},
            "names": names,
            "ranks": [list(one) for one in ranks],
        },
    ]


@torch.no_grad()
def _prune(things: Sequence[Rebuildable], share: float) -> str:
    """Set the smallest weights of all layers together to zero; returns what was done."""
    weights = [weight for thing in things for weight in thing.weights]
    sizes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    count = round(share * len(sizes))
    bound = sizes.kthvalue(count).values if count else sizes.new_tensor(-1.0)
    zeros = 0
    for weight in weights:
        weight.masked_fill_(weight.abs().float() <= bound, 0)
        zeros += int((weight == 0).sum())
    return f"{zeros:,} of {len(sizes):,} weights are zero before anything is looked at, those up to {float(bound):.3g}"


def _needed(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        what = "method.worth=sensitivity looks at a calibration set, and there is none"
        raise UserError(Mistake(what, "method.worth", hint="method.worth=energy"))
    return calibration


def _trained_whole(model: nn.Module, family: Family) -> None:
    whole.widen(model)
    whole.release(model, family)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each once."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in model.state_dict()}
    return {name: tensor.detach() for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


@torch.no_grad()
def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(model).items():
        tensor.copy_(tensors[name])


@contextmanager
def _as_before(model: nn.Module, found: Found) -> Iterator[nn.Module]:
    kept = found.read()
    assert kept is not None
    now = {name: tensor.to("cpu", copy=True) for name, tensor in _tensors(model).items()}
    _put(model, kept[1])
    try:
        yield model
    finally:
        _put(model, now)
