"""KPSVD as a method: attached, ranked, settled on the untouched base at the end, and shown in the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract, gradients
from peftcli.methods.contract import Calibration
from peftcli.methods.gradients import Watched, Weights
from peftcli.methods.injection import inject
from peftcli.methods.kpsvd import gains, spectra, start, tuned
from peftcli.methods.kpsvd.config import NAME, KpsvdConfig
from peftcli.methods.kpsvd.layer import KpsvdLayer, check_kind
from peftcli.methods.kpsvd.model import KpsvdModel
from peftcli.methods.kpsvd.settings import Settings
from peftcli.methods.kpsvd.start import Start
from peftcli.methods.peft_types import PeftRow, register
from peftcli.models import packed, roles
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, KpsvdConfig, KpsvdModel)
ADAPTER = "default"
NAMED = 3
"""Modules that a note names."""


class Method(contract.Method):
    """Trains the leading Kronecker terms of each targeted weight."""

    settings: Settings
    capabilities = contract.Capabilities(layers=frozenset({"linear", "conv2d"}))

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if settings.base == "residual":
            why = "method.base=residual takes the first terms out of the base's matrices; take method.base=delta"
            self.capabilities = dataclasses.replace(self.capabilities, whole_base=why)
        self._starts: dict[str, Start] = {}

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. On the meta device the factors are shapes alone, as many as there may be.

        Raises:
            UserError: What `start.find`, `ranks.choose` and `tuned.changes` say, or there is no calibration set where
                one is needed.
            CheckFailed: What `gradients.visit` says.
        """
        register(PEFT_TYPE)
        names = roles.resolve(model, family, self.settings.targets or family.default_targets)
        config = self._config()
        if all(getattr(model.get_submodule(name), "weight", None) is None or _on_meta(model, name) for name in names):
            config.start = "file"
            self._note_count(model, names)
        elif self._measures or self.settings.source != "weight":
            config.starts = self._found(model, names, config, calibration)
        wrapped: Any = inject(model, config, names)
        self._starts = wrapped.base_model.starts[ADAPTER]
        if config.base == "residual" and (fixed := wrapped.base_model.fixed):
            self._note_fixed(model, fixed)
        if config.rank == "auto" and self._starts:
            self.notes.append(spectra.summary(self._starts))
        return wrapped

    def _note_fixed(self, model: Any, fixed: set[str]) -> None:
        bits = packed.kind(model)
        why = f"a weight in {bits} would be rounded again" if bits else "a weight that is another layer's too stays"
        said = f"{len(fixed)} modules ({', '.join(sorted(fixed)[:NAMED])}{', ...' if len(fixed) > NAMED else ''})"
        self.notes.append(f"method.base=residual is delta in {said}: {why}, so the first terms are subtracted")

    def _note_count(self, model: nn.Module, names: list[str]) -> None:
        """What shapes alone do not say."""
        settings = self.settings
        if settings.rank == "auto" and settings.budget is None:
            most = f"the most there may be, method.max_rank={settings.max_rank} terms of each module"
            self.notes.append(f"method.rank=auto is counted as {most}: how many are worth it shows on the real weights")
        if settings.source == "gradient":
            held = 4 * sum(packed.shape(model.get_submodule(name)).numel() for name in names)
            what = f"their gradients, {held / 1e9:.2f} GB in float32, are held for a moment before the first step"
            self.notes.append(f"method.source=gradient of {len(names)} modules: {what}, which is not counted")

    def _config(self) -> KpsvdConfig:
        known = {field.name for field in dataclasses.fields(KpsvdConfig)}
        given = {name: value for name, value in vars(self.settings).items() if name in known}
        return KpsvdConfig(**given)

    @property
    def _measures(self) -> bool:
        settings = self.settings
        return settings.rank == "auto" and settings.energy is None and settings.budget is None

    def _found(
        self, model: nn.Module, names: list[str], config: KpsvdConfig, calibration: Calibration | None
    ) -> dict[str, Start]:
        """Where the modules start, as far as the weights alone do not say it."""
        if self._measures and calibration is None:
            hint = "give method.energy or method.budget, or a number as method.rank"
            raise UserError(Mistake("method.rank=auto chooses by a calibration set, and there is none", hint=hint))
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        for layer in layers.values():
            check_kind(layer)
        weights = packed.Weights(layers)
        start.check(weights)
        alone = gradients.watched(model, layers)
        with torch.no_grad():
            starts = start.find(self._source(model, weights, alone, calibration), config)
        if not self._measures or calibration is None:
            return starts
        candidates = {name: found.terms for name, found in starts.items()}
        batches, trained = self.settings.calibration_batches, config.sigma == "trained"
        measured = gains.measure(model, alone, candidates, calibration, batches, trained)
        starts, told = gains.cut(starts, measured, config, self.settings.loss_increase)
        self.notes.append(told)
        return starts

    def _source(self, model: nn.Module, weights: Weights, alone: Watched, calibration: Calibration | None) -> Weights:
        """What is decomposed in each module."""
        settings = self.settings
        if settings.source == "weight":
            return weights
        if settings.source == "delta":
            assert settings.tuned is not None
            return tuned.changes(settings.tuned, weights)
        if calibration is None:
            raise UserError(Mistake("method.source=gradient looks at a calibration set, and there is none"))
        found = gradients.mean(model, alone, calibration, settings.calibration_batches)
        # One step size for all: scaled each on its own, modules that hardly matter would start as large as the others.
        # Taking more out of a weight than its own size would cost digits of what is left.
        sizes = {name: float(torch.linalg.vector_norm(gradient)) for name, gradient in found.items()}
        step = min((_size(weights[name]) / size for name, size in sizes.items() if size), default=1.0)
        return {name: gradient.mul_(step) for name, gradient in found.items()}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The first factors, and which candidates they are: computed anew they may differ in their last bits."""
        kept = {f"{name}.kept": torch.tensor(found.kept) for name, found in self._starts.items()}
        first = {f"{name}.{key}": t for name, layer in _layers(model) for key, t in layer.first(ADAPTER).items()}
        return kept | first

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        """See the contract."""
        config = model.peft_config[ADAPTER]
        for name, layer in _layers(model):
            now = layer.first(ADAPTER)
            then = {key: state[f"{name}.{key}"].to(tensor.device) for key, tensor in now.items()}
            if all(torch.equal(tensor, then[key]) for key, tensor in now.items()):
                continue
            kept, found = tuple(state[f"{name}.kept"].tolist()), self._starts[name]
            self._starts[name] = Start(found.terms, dataclasses.replace(found.cut, terms=len(kept)), kept)
            config.rank_pattern[name] = len(kept)
            layer.begin(ADAPTER, then, config.scale(len(kept)))

    def finish(self, model: Any) -> None:
        """Give the base its own weights back, bit for bit; the adapter is now a change of them, as its file holds it:
        what is measured next is what will be loaded."""
        for _, layer in _layers(model):
            layer.settle(ADAPTER)
            if model.peft_config[ADAPTER].save_dtype == "bfloat16":
                layer.round_change(ADAPTER)
        model.peft_config[ADAPTER].base = "delta"

    def figures(self, model: Any) -> list[dict[str, Any]]:
        """Every module's spectrum with its cut and what decided it."""
        return spectra.figures(self._starts, self.notes)


def _size(weight: Tensor) -> float:
    return float(torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32)))


def _on_meta(model: nn.Module, name: str) -> bool:
    weight: Any = model.get_submodule(name).weight
    return bool(weight.is_meta)


def _layers(model: Any) -> Iterator[tuple[str, KpsvdLayer]]:
    """The adapted modules by the names they have in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, KpsvdLayer):
            yield name, module
