"""The base as it is, as a PEFT adapter that adapts nothing."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Capabilities, Stage
from peftcli.methods.injection import has_head, inject
from peftcli.models.family import Family


class Method(contract.Method):
    """Takes no steps."""

    capabilities = Capabilities(trains=False, layers=frozenset())

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. Raises UserError where a head of random numbers would be measured."""
        if has_head(model):
            what = "method=frozen trains nothing, and the head of this task is drawn at random"
            raise UserError(Mistake(what, hint="take method=linear_probe"))
        return inject(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES))

    def stages(self, total_steps: int) -> list[Stage]:
        """None."""
        return []
