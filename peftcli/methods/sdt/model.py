"""The tuner: which modules of a model get an `SdtLayer`, as PEFT asks."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peftcli.methods.sdt.layer import SdtLayer


class SdtModel(BaseTuner):
    """A model whose state-space blocks are `SdtLayer`s."""

    prefix = "sdt_"
    tuner_layer_cls = SdtLayer
    target_module_mapping: dict[str, list[str]] = {"mamba": ["mixer"]}  # noqa: RUF012 - as PEFT has it

    def _create_and_replace(
        self,
        peft_config: Any,  # SdtConfig
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        sizes = peft_config.sizes.get(current_key) if peft_config.sizes else None
        layer = target if isinstance(target, SdtLayer) else SdtLayer(target)
        layer.update_layer(adapter_name, peft_config, sizes)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands on `weight`, which a block does not have; ours is on the right device from the start.
        setattr(parent, child_name, new_module)
