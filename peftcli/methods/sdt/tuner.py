"""SDT as a method: selected on a calibration set, or after a warm-up from which nothing but the selection is left."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.mamba.modeling_mamba import MambaMixer

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Stage
from peftcli.methods.injection import inject
from peftcli.methods.peft_types import PeftRow, register
from peftcli.methods.sdt import maths, spectrum
from peftcli.methods.sdt.config import NAME, SdtConfig
from peftcli.methods.sdt.layer import SdtLayer
from peftcli.methods.sdt.maths import Selection
from peftcli.methods.sdt.model import SdtModel
from peftcli.methods.sdt.selecting import Gradients, Mixers
from peftcli.methods.sdt.settings import Settings
from peftcli.models.family import Family

PEFT_TYPE = PeftRow(NAME, SdtConfig, SdtModel)
ADAPTER = "default"
PROJECTIONS = {"ssm.in": "in_proj", "ssm.x": "x_proj", "ssm.dt": "dt_proj", "ssm.out": "out_proj"}
SHARE = 20
"""A selection may look at one batch for so many steps of the run."""
WARMED_UP = ("magnitude", "abar")


class Method(contract.Method):
    """Trains the chosen channels and states of each state-space block, and LoRA on its projections."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.capabilities = contract.Capabilities(layers=frozenset({"ssm"}))
        if settings.pruned:
            self.capabilities = replace(self.capabilities, identity_at_start=False)
        self._scores: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}
        self._stepped = False
        self._batches_per_epoch: int | None = None

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. On the meta device `auto` counts as the most channels and states that it can mean.

        Raises:
            UserError: The model has no Mamba blocks, or they differ; there are fewer channels or states than asked
                for; the warm-up is longer than the training rows.
        """
        register(PEFT_TYPE)
        settings, mixers = self.settings, blocks(model)
        A_log_DN = next(iter(mixers.values())).A_log
        D, N = A_log_DN.shape
        most = self._most(D, N)
        config = SdtConfig(
            r=settings.r,
            alpha=settings.alpha,
            dropout=settings.dropout,
            projections=[PROJECTIONS[target] for target in settings.lora_targets],
        )
        if A_log_DN.is_meta:
            config.sizes = dict.fromkeys(mixers, most)
            return inject(model, config, mixers)
        if calibration and settings.selector in WARMED_UP:
            self._check_warmup(calibration)
        found = self._gradients(model, mixers, calibration)
        if settings.selector in WARMED_UP:
            return inject(model, config, mixers)
        selections = {name: self._select(name, *self._score(name, D, N, found)) for name in mixers}
        config.sizes = {name: _sizes(*chosen) for name, chosen in selections.items()}
        wrapped = inject(model, config, mixers)
        for name, layer in layers(wrapped):
            layer.choose(ADAPTER, *selections[name])
        self._say(wrapped, found)
        return wrapped

    def _most(self, D: int, N: int) -> list[int]:
        """The most channels and states that the settings can mean, and the pruned channels."""
        settings = self.settings
        asked = ((settings.channels, D, "channels"), (settings.states, N, "states"))
        return [
            *(math.ceil(settings.score_share * n) if a == "auto" else maths.count(a, n, key) for a, n, key in asked),
            maths.count(settings.pruned, D, "pruned"),
        ]

    def _check_warmup(self, calibration: Calibration) -> None:
        self._batches_per_epoch = calibration.batches_per_epoch
        steps = self._warmup_steps(calibration.total_steps)
        if steps > calibration.batches_per_epoch:
            raise UserError(
                Mistake(
                    f"the warm-up takes {steps} steps, but the training rows make only "
                    f"{calibration.batches_per_epoch} batches",
                    hint="set method.warmup to at most that, or method.selector=taylor, which needs no warm-up",
                )
            )

    def _gradients(self, model: nn.Module, mixers: Mixers, calibration: Calibration | None) -> Gradients | None:
        if self.settings.selector != "taylor" and not self.settings.pruned:
            return None
        if calibration is None:
            raise UserError(
                Mistake(f"method.selector={self.settings.selector} chooses with rows, and there are none here")
            )
        batches = max(1, min(self.settings.calibration_batches, calibration.total_steps // SHARE))
        found = Gradients(model, mixers, calibration, batches)
        self._importance = found.channels
        return found

    def _score(self, name: str, D: int, N: int, found: Gradients | None) -> tuple[Tensor, Tensor | None]:
        if self.settings.selector == "random":
            return torch.rand(D, N), None
        assert found is not None
        return found.pairs[name], found.columns[name]

    def _select(self, name: str, score_DN: Tensor, extra_D: Tensor | None) -> tuple[Selection, Tensor]:
        settings = self.settings
        self._scores[name] = maths.channel_scores(score_DN, extra_D)
        selection = maths.select(score_DN, settings.channels, settings.states, settings.score_share, extra_D, name)
        importance_D = self._importance.get(name, self._scores[name])
        return selection, maths.least(importance_D, selection.channels_K, settings.pruned)

    def stages(self, total_steps: int) -> list[Stage]:
        """The warm-up, where the selector needs one, and the training.

        Raises:
            UserError: The warm-up leaves no step.
        """
        if self.settings.selector not in WARMED_UP:
            return [Stage("train", total_steps)]
        steps = self._warmup_steps(total_steps)
        warmup = Stage("warm-up", steps, measured=False)
        return [warmup, Stage("train", total_steps - steps, self._end_warmup)]

    def _warmup_steps(self, total_steps: int) -> int:
        warmup = self.settings.warmup
        if isinstance(warmup, int):
            steps = warmup
        else:
            steps = min(maths.count(warmup, total_steps), self._batches_per_epoch or total_steps)
        if steps >= total_steps:
            raise UserError(
                Mistake(
                    f"method.warmup={warmup} takes {steps} of the run's {total_steps} steps",
                    hint="leave some for the training: a smaller method.warmup, or more steps",
                )
            )
        return steps

    def after_step(self, model: nn.Module, step: int) -> None:
        """A selection that follows has something to go by."""
        self._stepped = True

    @torch.no_grad()
    def _end_warmup(self, model: Any) -> None:
        """Choose by what the warm-up changed; where none was run here, the checkpoint brings the selection."""
        warmed = {name: layer for name, layer in layers(model) if ADAPTER in layer.sdt_warmup}
        changes = {name: layer.sdt_warmup[ADAPTER]["A_log"] for name, layer in warmed.items()}
        ran = self._stepped or any(bool(G_DN.any()) for G_DN in changes.values() if not G_DN.is_meta)
        for name, layer in warmed.items():
            if ran:
                layer.choose(ADAPTER, *self._select(name, self._change(layer.base_layer, changes[name]), None))
            else:
                layer.choose(ADAPTER, *maths.first(*self._most(*layer.shape)))
            layer.start_lora(ADAPTER)
        _start_heads(model)
        self._note_sizes(model)
        if ran and warmed:
            self._say(model, None)

    def _change(self, mixer: Any, G_DN: Tensor) -> Tensor:
        if self.settings.selector == "magnitude":
            return maths.magnitude(G_DN)
        return maths.abar_change(mixer.A_log, G_DN, mixer.dt_proj.bias)

    def _note_sizes(self, model: Any) -> None:
        made = {name: layer.selection(ADAPTER) for name, layer in layers(model)}
        model.peft_config[ADAPTER].sizes = {name: _sizes(*found) for name, found in made.items() if found}

    def _say(self, model: Any, found: Gradients | None) -> None:
        sizes = list(model.peft_config[ADAPTER].sizes.values())
        D, N = next(layer.shape for _, layer in layers(model))
        by = f" by {found.batches} batches" if found and self.settings.selector == "taylor" else ""
        scores = {} if self.settings.selector == "random" else self._scores
        self.notes.append(f"selected ({self.settings.selector}{by}) " + spectrum.summary(sizes, D, N, scores))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The selection and the scores it was made by."""
        kept = {f"{name}.score": score_D for name, score_D in self._scores.items()}
        for name, layer in layers(model):
            if (found := layer.selection(ADAPTER)) is not None:
                selection, pruned_X = found
                kept |= {f"{name}.channels": selection.channels_K, f"{name}.states": selection.states_KS}
                kept[f"{name}.pruned"] = pruned_X
        return kept

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """See the contract."""
        # A checkpoint's tensors come in any order, and sizes are told in the model's.
        named = ((name, f"{name}.score") for name, _ in layers(model))
        self._scores = {name: state[key] for name, key in named if key in state}
        for name, layer in layers(model):
            if f"{name}.channels" in state:
                selection = Selection(state[f"{name}.channels"], state[f"{name}.states"])
                layer.choose(ADAPTER, selection, state[f"{name}.pruned"])
        if any(name.endswith(".channels") for name in state):
            self._note_sizes(model)
            if not self.notes:
                self._say(model, None)

    def figures(self, model: nn.Module) -> list[dict[str, Any]]:
        """The scores of each layer, and where in each layer the chosen channels are."""
        chosen = {name: found[0].channels_K for name, layer in layers(model) if (found := layer.selection(ADAPTER))}
        D = next(layer.shape[0] for _, layer in layers(model))
        return spectrum.figures(self._scores, chosen, D)


def blocks(model: nn.Module) -> Mixers:
    """The model's Mamba blocks by name.

    Raises:
        UserError: It has none, they are not of one shape, or their A_log has been in half precision.
    """
    mixers = {name: module for name, module in model.named_modules() if isinstance(module, MambaMixer)}
    if not mixers:
        raise UserError(
            Mistake(
                f"method=sdt needs a state-space model; {type(model).__name__} has no Mamba block",
                hint="models that have: model=mamba-wordnet, model=mamba-130m; for others there is method=lora",
            )
        )
    shapes = {tuple(mixer.A_log.shape): name for name, mixer in mixers.items()}
    if len(shapes) > 1:
        found = ", ".join(f"{D} channels of {N} states ({name})" for (D, N), name in shapes.items())
        raise UserError(Mistake(f"method=sdt needs state-space layers of one shape; here are {found}"))
    if half := _rounded_to([mixer.A_log for mixer in mixers.values()]):
        raise UserError(
            Mistake(
                f"method=sdt needs A_log in float32, and all of it here has been rounded to {half}: A = -exp(A_log) is "
                "off by up to 1 %",
                hint="take a checkpoint that was saved in float32; for this one there is method=lora",
            )
        )
    return mixers


def _rounded_to(logs: list[Tensor]) -> str:
    """The half-precision type that holds all of these exactly, empty where none does or they are constant anyway."""
    if any(A_log_DN.is_meta for A_log_DN in logs) or all(A_log_DN.eq(A_log_DN[0, 0]).all() for A_log_DN in logs):
        return ""
    for half in (torch.bfloat16, torch.float16):
        if all(torch.equal(A_log_DN.to(half).to(A_log_DN.dtype), A_log_DN) for A_log_DN in logs):
            return str(half).removeprefix("torch.")
    return ""


def layers(model: Any) -> Iterator[tuple[str, SdtLayer]]:
    """The adapted blocks by the names they have in the base."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, SdtLayer):
            yield name, module


def _start_heads(model: nn.Module) -> None:
    """Give what is trained whole (a classification head) the values it had when it was attached."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save[ADAPTER].load_state_dict(module.original_module.state_dict())


def _sizes(selection: Selection, pruned_X: Tensor) -> list[int]:
    return [*selection.states_KS.shape, len(pruned_X)]
