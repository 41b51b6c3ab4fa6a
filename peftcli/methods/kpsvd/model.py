"""KPSVD as a tuner of PEFT: `get_peft_model(model, KpsvdConfig(...))` and `PeftModel.from_pretrained` work with it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.kpsvd import shapes, start
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.layer import KpsvdLayer, check_kind
from peftcli.methods.kpsvd.start import Start
from peftcli.models import packed

TRAINED, FIRST = ("kpsvd_U", "kpsvd_V", "kpsvd_S"), "0"


class KpsvdModel(BaseTuner):
    """The tuner.

    Attributes:
        starts: Of each adapter, where its modules started, by module name; empty for a loaded one.
        fixed: Modules whose weights stay as they are in residual mode too.
    """

    prefix = "kpsvd_"
    tuner_layer_cls: Any = KpsvdLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Decompose all targets at once, before the first of them is replaced."""
        config: KpsvdConfig = peft_config
        _maybe_include_all_linear_layers(config, model)
        layers = {name: layer for name, layer in self._targets(config, model) if _is_whole(layer)}
        for layer in layers.values():
            if isinstance(layer, KpsvdLayer):
                layer.put_back()
            check_kind(_base(layer))
        bases = {name: _base(layer) for name, layer in layers.items()}
        splits = {name: start.split_of(packed.shape(base), config) for name, base in bases.items()}
        others = packed.shared(model)
        self.fixed = {name for name, base in bases.items() if packed.is_packed(base) or id(base.weight) in others}
        if not hasattr(self, "starts"):
            self.starts: dict[str, dict[str, Start]] = {}
        adapter = next(name for name, other in self.peft_config.items() if other is config)
        with torch.no_grad():
            looked_at = packed.Weights(bases)
            found = config.starts or (start.find(looked_at, config) if config.start == "svd" else {})
        self.starts[adapter] = found
        cuts = {name: each.cut for name, each in found.items()} if found else start.counted(splits, config)
        config.rank_pattern = {name: cut.terms for name, cut in cuts.items()}
        config.splits = {shapes.key(split.rows, split.columns): list(split) for split in splits.values()}

    def _targets(self, config: KpsvdConfig, model: nn.Module) -> list[tuple[str, nn.Module]]:
        found: list[tuple[str, nn.Module]] = []
        inside: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if name and not name.startswith(inside) and self._hit(config, name):
                found.append((name, module))
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
        return found

    def _hit(self, config: KpsvdConfig, name: str) -> bool:
        # PEFT says "excluded" with an object that is true as well.
        found = self._check_target_module_exists(config, name)
        return bool(found) and type(found).__name__ != "_ExcludedModule"

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
        layer = target if isinstance(target, KpsvdLayer) else KpsvdLayer(target)
        if layer is not target and adapter_name in self.active_adapters:
            layer._active_adapter = [adapter_name]
        elif layer is not target:
            layer._active_adapter = list(self.active_adapters)
        split = start.split_of(packed.shape(layer.base_layer), config)
        found = self.starts[adapter_name].get(current_key)
        takes_out = config.base == "residual" and current_key not in self.fixed
        layer.update_layer(adapter_name, config, split, config.rank_pattern[current_key], found, takes_out)
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
        """Trained and first factors. In bfloat16 the first ones, which are such numbers, and how they have changed:
        the change of a rounded factor would mostly be its rounding."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.save_dtype != "bfloat16":
            return found
        return {
            key: (tensor - found[first] if (first := _first(key)) else tensor).bfloat16() if _ours(key) else tensor
            for key, tensor in found.items()
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Undo what `_get_adapter_state_dict` does to bfloat16 files.

        Raises:
            UserError: An adapter of that name has its factors already: in residual mode the weight is without them.
        """
        for layer in model.modules():
            present: Any = layer.kpsvd_U0 if isinstance(layer, KpsvdLayer) else {}
            if adapter_name in present and not present[adapter_name].is_meta and present[adapter_name].any():
                hint = f"load it under another name, or remove that one first: delete_adapter({adapter_name!r})"
                raise UserError(Mistake(f"an adapter named {adapter_name!r} is on this model already", hint=hint))
        if config.save_dtype == "bfloat16":
            wide = {key: tensor.float() if _ours(key) else tensor for key, tensor in state_dict.items()}
            state_dict = {
                key: tensor + wide[first] if (first := _first(key)) in wide else tensor for key, tensor in wide.items()
            }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _base(layer: nn.Module) -> Any:
    return layer.base_layer if isinstance(layer, KpsvdLayer) else layer


def _is_whole(layer: nn.Module) -> bool:
    """Not a wrapper that trains and saves a module whole."""
    return not hasattr(layer, "modules_to_save")


def _ours(key: str) -> bool:
    return any(part.startswith(KpsvdModel.prefix) for part in key.split("."))


def _first(key: str) -> str:
    """The key of a trained factor's first value; empty for other keys."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if part in TRAINED:
            return ".".join([*parts[:place], part + FIRST, *parts[place + 1 :]])
    return ""
