"""LoRA, DoRA, rsLoRA and PiSSA through PEFT's own tuner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration
from peftcli.methods.injection import inject
from peftcli.methods.lora.rearranged import Rearrangement, moves_weights
from peftcli.methods.lora.settings import Settings
from peftcli.models import roles
from peftcli.models.family import Family


class Method(contract.Method):
    """Trains `W + scale * B A` for each targeted matrix W, which stays frozen."""

    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if moves_weights(settings.init):
            why = f"method.init={settings.init} moves a part of the base's matrices; take method.init=default"
            self.capabilities = replace(self.capabilities, whole_base=why)
        self._rearrangement: Rearrangement | None = None

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. Raises UserError where two settings exclude each other."""
        settings = self.settings
        names = roles.resolve(model, family, settings.targets or family.default_targets)
        moves = moves_weights(settings.init)
        if moves and (settings.use_dora or settings.dropout or settings.bias != "none"):
            raise UserError(
                Mistake(
                    f"method.init={settings.init} moves part of the weight into the adapter, so it needs "
                    "use_dora=false, dropout=0 and bias=none",
                    hint="dropout would drop that part; DoRA or a bias cannot be written as a LoRA of the base",
                )
            )
        self._rearrangement = Rearrangement(model, names) if moves else None
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT computes with it as it is
            lora_dropout=settings.dropout,
            init_lora_weights=True if settings.init == "default" else settings.init,  # type: ignore[arg-type]
            use_dora=settings.use_dora,
            use_rslora=settings.use_rslora,
            bias=settings.bias,
        )
        wrapped = inject(model, config, names)
        if self._rearrangement:
            self._rearrangement.start(wrapped)
        return wrapped

    def finish(self, model: Any) -> None:
        """Give the base back its own weights where the initialisation moved a part of them."""
        if self._rearrangement:
            self._rearrangement.undo(model)
            self._rearrangement = None
