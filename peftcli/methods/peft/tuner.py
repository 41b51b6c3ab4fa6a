"""Any tuner of Hugging Face PEFT, with the calls around it that PEFT leaves to the training loop."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from torch import nn

from peftcli.config import peft_types
from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Stage
from peftcli.methods.injection import has_head, inject, plain
from peftcli.methods.lora.rearranged import Rearrangement, moves_weights
from peftcli.methods.peft import adalora, kinds
from peftcli.methods.peft.settings import Settings
from peftcli.models import roles
from peftcli.models.family import Family

OURS = frozenset({"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"})
"""Fields of PEFT's configurations that follow from the rest of the recipe."""
SELF_TARGETING = frozenset({"ADAPTION_PROMPT", "TRAINABLE_TOKENS"})
"""Tuners that find their modules by other means than a table of model types."""
OWN_TARGETS = {"IA3": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING}
"""Tables that are no attribute of the tuner."""


class Method(contract.Method):
    """Trains what the tuner named `method.type` trains.

    Raises:
        UserError: Unknown type or argument, or a type that the loop cannot train.
    """

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.type = settings.type.upper()
        known = {str(getattr(kind, "value", kind)): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.type not in known:
            raise UserError(unknown("method.type", settings.type, known))
        if self.type in kinds.UNFIT:
            raise UserError(Mistake(f"method.type={self.type} cannot be trained here: {kinds.UNFIT[self.type]}"))
        self._config_class = known[self.type]
        self.capabilities = kinds.CAPABILITIES.get(self.type, kinds.LINEAR)
        self._rearrangement: Rearrangement | None = None
        self._check_arguments()

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. Raises UserError where the tuner does not fit the model."""
        if self.type in kinds.NEED_EMBEDDINGS and has_head(model):
            raise UserError(
                Mistake(
                    f"method.type={self.type} hides from a linear head where a padded row ends",
                    hint="task.head=label_words, or PREFIX_TUNING",
                )
            )
        names = self._names(model, family)
        moves = self.type == "LORA" and moves_weights(self.settings.args.get("init_lora_weights"))
        self._rearrangement = Rearrangement(model, names or ()) if moves else None
        wrapped = inject(model, self._config(), names)
        if self._rearrangement:
            self._rearrangement.start(wrapped)
        if self.type == "ADALORA":
            adalora.freeze_rank_counts(wrapped)
        return wrapped

    def stages(self, total_steps: int) -> list[Stage]:
        """One stage; AdaLoRA learns there how many steps it has."""
        if self.type != "ADALORA":
            return [Stage("train", total_steps)]
        return [Stage("train", total_steps, adalora.schedule(self.settings.args, total_steps))]

    def after_step(self, model: Any, step: int) -> None:
        """Move AdaLoRA's budget of ranks to where it matters."""
        if self.type == "ADALORA":
            model.base_model.update_and_allocate(step)

    def penalty(self, model: Any) -> torch.Tensor | None:
        """AdaLoRA's orthogonality term."""
        return adalora.penalty(model) if self.type == "ADALORA" else None

    def state(self, model: Any) -> dict[str, torch.Tensor]:
        """AdaLoRA's averages of importance and its present allocation."""
        return adalora.state(model) if self.type == "ADALORA" else {}

    def restore(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        if self.type == "ADALORA":
            adalora.restore(model, state)

    def finish(self, model: Any) -> None:
        """Give the base back its own weights where LoRA's initialisation moved a part of them."""
        if self._rearrangement:
            self._rearrangement.undo(model)
            self._rearrangement = None

    def _check_arguments(self) -> None:
        arguments = self.settings.args
        known = {field.name for field in dataclasses.fields(self._config_class) if field.init} - OURS
        mistakes = [unknown(f"argument of PEFT's {self.type}", name, known) for name in arguments if name not in known]
        if "target_modules" in arguments:
            mistakes.append(Mistake("method.args.target_modules is set by method.targets", hint="use method.targets"))
        if arguments.get("init_lora_weights") in kinds.DATA_DRIVEN:
            init = arguments["init_lora_weights"]
            mistakes.append(Mistake(f"init_lora_weights={init} needs a step before training that is not built in"))
        if arguments.get("use_asa"):
            mistakes.append(Mistake("AdaMSS's use_asa keeps averages that no checkpoint holds"))
        if self.settings.targets and "target_modules" not in known:
            mistakes.append(Mistake(f"PEFT's {self.type} takes no targets", hint="leave method.targets empty"))
        mistakes += peft_types.lacking(self.type, arguments)
        if mistakes:
            raise UserError(*mistakes)

    def _config(self) -> PeftConfig:
        arguments: dict[str, Any] = dict(self.settings.args)
        if self.type == "ADALORA":
            # Known only when the stage starts; the configuration insists on a number.
            arguments.setdefault("total_step", sys.maxsize)
        try:
            return self._config_class(**arguments)
        except Exception as error:
            what = f"PEFT's {self.type} refuses method.args={self.settings.args}: {plain(error)}"
            raise UserError(Mistake(what, "method.args")) from error

    def _names(self, model: Any, family: Family) -> list[str] | None:
        """The modules to adapt; None where the tuner needs no names."""
        if self.settings.targets:
            return roles.resolve(model, family, self.settings.targets)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(self.type))
        takes_targets = any(field.name == "target_modules" for field in dataclasses.fields(self._config_class))
        own = getattr(tuner, "target_module_mapping", None) or OWN_TARGETS.get(self.type, {})
        if not takes_targets or self.type in SELF_TARGETING:
            return None
        return roles.resolve(model, family, own.get(model.config.model_type, [roles.ALL]))
