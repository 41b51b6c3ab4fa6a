"""Full fine-tuning, with an optional first stage for the head (LP-FT: Kumar et al., ICLR 2022)."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods import contract, whole
from peftcli.methods.contract import Calibration, Capabilities, Stage
from peftcli.methods.full.settings import Settings
from peftcli.methods.injection import has_head, head_of
from peftcli.models.family import Family


class Method(contract.Method):
    """Trains all weights in float32; saves the whole model.

    Raises:
        UserError: `head_first` is not a share.
    """

    capabilities = Capabilities(
        merges=False, unloads=False, several_adapters=False, layers=frozenset({"linear", "conv2d", "ssm"})
    )
    saves = "model"
    settings: Settings

    def __init__(self, settings: Settings):
        super().__init__(settings)
        if not 0.0 <= settings.head_first < 1.0:
            raise UserError(Mistake(f"method.head_first={settings.head_first} is not in [0, 1)"))
        self._family = Family("unknown", ())

    def attach(self, model: nn.Module, family: Family, calibration: Calibration | None = None) -> nn.Module:
        """See the contract. The weights become float32, one after another, so that small steps are not rounded away.

        Raises:
            UserError: `head_first` where the head is no tensor of its own.
        """
        self._check_head(model)
        self._family = family
        whole.widen(model)
        self._train_all(model)
        return model

    def stages(self, total_steps: int) -> list[Stage]:
        """All at once, or the head and then all."""
        first = round(self.settings.head_first * total_steps)
        if first == 0:
            return [Stage("train", total_steps)]
        return [Stage("head", first, _train_head), Stage("all", total_steps - first, self._train_all)]

    def _train_all(self, model: nn.Module) -> None:
        whole.release(model, self._family)

    def _check_head(self, model: Any) -> None:
        if self.settings.head_first == 0 or has_head(model):
            return
        embeddings = model.get_input_embeddings()
        if embeddings is not None and _head(model).weight is embeddings.weight:
            raise UserError(
                Mistake(
                    "method.head_first needs a head of its own; this model's is its embedding",
                    hint="method.head_first=0, or task.head=linear",
                )
            )


def _head(model: Any) -> Any:
    if has_head(model):
        return model.get_submodule(head_of(model))
    return model.get_output_embeddings()


def _train_head(model: nn.Module) -> None:
    model.requires_grad_(False)
    _head(model).requires_grad_(True)
