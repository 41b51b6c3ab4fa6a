"""The mode `tie`: a pretrained model whose maps share matrices in pairs, or the paper's ResNet from the start.

All of the model is trained. Tying keeps half of the weights of what is tied, and every multiplication: it saves memory
and not arithmetic.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import distillation, whole
from peftcli.methods.contract import Calibration, Form
from peftcli.methods.rowcol import pairs
from peftcli.methods.rowcol.pairs import Group
from peftcli.methods.rowcol.settings import Settings
from peftcli.models.compact import halvit
from peftcli.models.compact.registered import compacted, model_class
from peftcli.models.family import Family

TIED_STAGES = 2
"""The last stages of the paper's ResNet share their matrices."""


class Tie(distillation.Distilled):
    """Ties a model's weights and trains it whole."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._errors: dict[str, float] = {}
        self._untied: dict[str, nn.Module] = {}
        """The original's layers in the places of those that share a matrix."""

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """See the contract.

        Raises:
            UserError: What `pairs.find` says; with `layout: halvit`, the base is no ResNet of bottlenecks.
        """
        teacher, blocks = copy.deepcopy(model), distillation.blocks_of(model, family)
        whole.widen(model)  # before new tensors of its type are filled with what is worked out in float64
        if self.settings.layout == "halvit":
            model, stages = self._laid_out(model)
            # Their blocks take more channels than the base's, and one more layer stands before them.
            blocks = [name for name in blocks if not name.startswith(tuple(f"{stage}." for stage in stages))] + stages
        else:
            model = self._converted(model, family, teacher)
        whole.release(model, family)
        self.taught_by(model, teacher, blocks)
        return model

    def _laid_out(self, model: Any) -> tuple[nn.Module, list[str]]:
        config = model.config
        if config.model_type != "resnet" or config.layer_type != "bottleneck":
            what = f"method.layout=halvit is a ResNet of bottlenecks, and the base is a {config.model_type}"
            raise UserError(Mistake(what, "method.layout", hint="model=resnet50, or method.layout=base"))
        stages = [f"{model.base_model_prefix}.encoder.stages.{place}" for place in range(len(config.depths))]
        tied = stages[-TIED_STAGES:]
        kind, place = model_class(model.__class__), next(model.parameters()).device
        drawn = type(config)(**config.to_dict())
        drawn.__class__ = kind.config_class
        drawn.parts = {name: {"kind": "halvit"} for name in tied}
        with torch.device(place):
            new: Any = kind(drawn)
        for weight in halvit.shared_matrices(new):
            nn.init.xavier_normal_(weight)
        self.notes.append("method.layout=halvit takes the base's shape alone: every weight is drawn anew")
        return new, tied

    def _converted(self, model: Any, family: Family, teacher: nn.Module) -> nn.Module:
        groups, left_out = pairs.find(model, family, self.settings.targets)
        old = {name: model.get_submodule(name) for group in groups for name in group.names}
        self._untied = {name: teacher.get_submodule(name) for name in old}
        real = not next(iter(old.values())).weight.is_meta
        fillings = [pairs.fill(model, group, self.settings.diagonal) for group in groups] if real else []
        parts = {
            use.name: {
                "kind": "tied",
                "to": group.source,
                "transposed": use.transposed,
                "diagonal": self.settings.diagonal and use.transposed,
            }
            for group in groups
            for use in group.uses
        }
        model = compacted(model, parts)
        with torch.no_grad():
            for group, filling in zip(groups, fillings, strict=False):
                filling.put(model, group, old)
                self._errors[group.source] = filling.error
        self._note(groups, left_out)
        return model  # type: ignore[no-any-return]

    def _note(self, groups: list[Group], left_out: dict[str, str]) -> None:
        for kind in dict.fromkeys(group.kind for group in groups):
            found = [group for group in groups if group.kind == kind]
            errors = [self._errors[group.source] for group in found if group.source in self._errors]
            uses = sum(len(group.uses) for group in found)
            said = f"{kind}: {uses} maps use the matrices of {len(found)} others"
            if errors:
                said += f", and differ from them by {sum(errors) / len(errors):.0%} before (0 % are tied already)"
            self.notes.append(said)
        if left_out:
            self.notes.append("not tied: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))

    def forms(self, model: nn.Module) -> list[Form]:
        """With the original's layers in the places of those that share a matrix; as it is. None of the paper's layout,
        in which other layers stand around them."""
        return whole.beside_original(self._untied, "tied") if self._untied else []

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """How far the tied maps were from each other."""
        if not self._errors:
            return []
        labels = {"x": "tied pair, from input to output", "y": "|W1 - W2ᵀ| / sqrt(|W1|² + |W2|²)"}
        errors = list(self._errors.values())
        title = "Difference of tied maps before training"
        return [{"title": title, "x": list(range(len(errors))), "y": [errors], "labels": labels}]
