"""Cores as a tuner of PEFT: `get_peft_model(model, RowcolConfig(...))` and `PeftModel.from_pretrained` work with it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.rowcol import bases
from peftcli.methods.rowcol.config import RowcolConfig
from peftcli.methods.rowcol.layer import RowcolLayer
from peftcli.models import packed

COLUMNS, ROWS = "rowcol_U", "rowcol_V"


class RowcolModel(BaseTuner):
    """The tuner."""

    prefix = "rowcol_"
    tuner_layer_cls: Any = RowcolLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(  # type: ignore[override]  # PEFT's callers name `current_key` alone
        self,
        config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target if isinstance(target, RowcolLayer) else RowcolLayer(target)
        if layer is not target:
            layer._active_adapter = [adapter_name] if adapter_name in self.active_adapters else self.active_adapters
        shape = packed.shape(layer.base_layer)
        rank = config.rank_pattern.get(current_key, min(config.rank, shape[0], shape[1:].numel()))
        config.rank_pattern[current_key] = rank
        layer.update_layer(adapter_name, config, rank, _basis(config, current_key, layer.base_layer, rank))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        """Cores, and each basis once, in the type to be saved."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        dtype = getattr(torch, config.save_dtype)
        low = dtype != torch.float32
        return {
            key: tensor.to(dtype) if low and _module(key, COLUMNS, ROWS) else tensor
            for key, tensor in found.items()
            if _module(key, ROWS) not in config.owners
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Undo what `_get_adapter_state_dict` does."""
        owned = {module: (key, tensor) for key, tensor in state_dict.items() if (module := _module(key, ROWS))}
        whole = dict(state_dict)
        for module, owner in config.owners.items():
            if owner in owned and module in config.rank_pattern:
                key, V_IK = owned[owner]
                whole[key.replace(owner, module, 1)] = V_IK[:, : config.rank_pattern[module]].clone()
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, whole)


def _basis(config: RowcolConfig, name: str, layer: nn.Module, rank: int) -> bases.Basis | None:
    """Where a module starts.

    Raises:
        UserError: Its weight is to be decomposed, and has no contents.
    """
    if config.start == "file":
        return None
    if name in config.bases:
        return config.bases[name]
    if packed.weight(layer).is_meta:
        hint = "load the whole model before the adapter goes in, or set start='file' and load its bases"
        raise UserError(Mistake(f"{name} is on the meta device: it has no contents to decompose", hint=hint))
    return bases.of_weights({name: layer}, {}, {name: rank})[name]


def _module(key: str, *kinds: str) -> str:
    """The module's name in the base where a key is of such a tensor of ours; empty for other keys."""
    for kind in kinds:
        path, found, _ = key.partition(f".{kind}")
        if found:
            return path.removeprefix("base_model.model.")
    return ""
