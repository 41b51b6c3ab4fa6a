"""The base as it is."""

from __future__ import annotations

from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract
from peftcli.methods.contract import Calibration, Capabilities, Stage
from peftcli.methods.frozen.settings import Settings
from peftcli.methods.injection import has_head
from peftcli.models.family import Family


class Method(contract.Method):
    """Takes no steps; saves the whole model, which is the base's."""

    capabilities = Capabilities(
        merges=False, unloads=False, several_adapters=False, trains=False, layers=frozenset()
    )  # fmt: skip
    saves = "model"
    settings: Settings

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """See the contract. Raises UserError where a head of random numbers would be measured."""
        if has_head(model):
            what = "method=frozen trains nothing, and the head of this task is drawn at random"
            raise UserError(Mistake(what, hint="take method=linear_probe"))
        return model

    def stages(self, total_steps: int) -> list[Stage]:
        """None."""
        return []
