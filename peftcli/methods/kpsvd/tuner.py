"""KPSVD as a method: attached, ranked, settled on the untouched base at the end, and shown in the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

from peft import PeftModel
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration
from peftcli.methods.injection import inject
from peftcli.methods.kpsvd import calibrated, spectra
from peftcli.methods.kpsvd.config import NAME, KpsvdConfig
from peftcli.methods.kpsvd.layer import KpsvdLayer
from peftcli.methods.kpsvd.model import KpsvdModel
from peftcli.methods.kpsvd.settings import Settings
from peftcli.methods.kpsvd.start import Start
from peftcli.methods.peft_types import PeftRow, register
from peftcli.models import roles
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, KpsvdConfig, KpsvdModel)
ADAPTER = "default"


class Method(contract.Method):
    """Trains the leading Kronecker terms of each targeted weight."""

    settings: Settings
    capabilities = contract.Capabilities(layers=frozenset({"linear", "conv2d"}))

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self._starts: dict[str, Start] = {}

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. On the meta device the factors are shapes alone, as many as there may be.

        Raises:
            UserError: What `start.find` and `ranks.choose` say, or there is no calibration set to choose ranks with.
        """
        register(PEFT_TYPE)
        names = roles.resolve(model, family, self.settings.targets or family.default_targets)
        config = self._config()
        measures = config.rank == "auto" and config.energy is None and config.budget is None
        if all(getattr(model.get_submodule(name), "weight", None) is None or _on_meta(model, name) for name in names):
            config.start, measures = "file", False
        if measures and calibration is None:
            hint = "give method.energy or method.budget, or a number as method.rank"
            raise UserError(Mistake("method.rank=auto chooses by a calibration set, and there is none", hint=hint))
        wrapped: Any = inject(model, config, names)
        self._starts = wrapped.base_model.starts[ADAPTER]
        if measures and calibration is not None:
            self._measure(wrapped, calibration)
        elif config.rank == "auto" and self._starts:
            self.notes = [spectra.summary(self._starts)]
        return wrapped

    def _config(self) -> KpsvdConfig:
        known = {field.name for field in dataclasses.fields(KpsvdConfig)}
        given = {name: value for name, value in vars(self.settings).items() if name in known}
        return KpsvdConfig(**given)

    def _measure(self, model: Any, calibration: Calibration) -> None:
        """Cut the layers, which hold all candidates, to what the calibration set asks for."""
        config = model.peft_config[ADAPTER]
        batches = list(islice(calibration.batches, self.settings.calibration_batches))
        bound = self.settings.loss_increase
        chosen = calibrated.choose(model, batches, calibration.loss, self._starts, config.rule, bound)
        for name, layer in _layers(model):
            layer.cut(ADAPTER, chosen.cuts[name].terms)
        self._starts = {name: Start(found.terms, chosen.cuts[name]) for name, found in self._starts.items()}
        config.rank_pattern = {name: cut.terms for name, cut in chosen.cuts.items()}
        self.notes = [*chosen.notes, spectra.summary(self._starts)]

    def finish(self, model: Any) -> None:
        """Give the base its own weights back, bit for bit; the adapter is now a change of them."""
        for _, layer in _layers(model):
            layer.settle(ADAPTER)
        model.peft_config[ADAPTER].base = "delta"

    def figures(self, model: Any) -> list[dict[str, Any]]:
        """Every module's spectrum with its cut and what decided it."""
        return spectra.figures(self._starts, self.notes)


def _on_meta(model: nn.Module, name: str) -> bool:
    weight: Any = model.get_submodule(name).weight
    return bool(weight.is_meta)


def _layers(model: Any) -> Iterator[tuple[str, KpsvdLayer]]:
    """The adapted modules by the names they have in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, KpsvdLayer):
            yield name, module
