"""The head alone, saved as a PEFT adapter that adapts nothing else."""

from __future__ import annotations

from peft import LoraConfig, PeftModel
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Capabilities
from peftcli.methods.injection import has_head, inject
from peftcli.models.family import Family


class Method(contract.Method):
    """Trains the classification head; everything below it stays the base's."""

    capabilities = Capabilities(layers=frozenset())

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> PeftModel:
        """See the contract. Raises UserError where the model has no classification head."""
        if not has_head(model):
            raise UserError(Mistake("method=linear_probe needs a classification head", hint="task.head=linear"))
        return inject(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES))
