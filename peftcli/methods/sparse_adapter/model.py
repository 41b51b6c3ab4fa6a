"""Sparse adapters as a tuner of PEFT: `get_peft_model` and `PeftModel.from_pretrained` work with it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from peftcli.methods.sparse_adapter import files
from peftcli.methods.sparse_adapter.layer import SparseAdapterLayer

MATRICES = ("sparse_down", "sparse_up")


class SparseAdapterModel(BaseTuner):
    """A model with bottlenecks in it."""

    prefix = "sparse_"
    tuner_layer_cls: Any = SparseAdapterLayer
    target_module_mapping: dict[str, list[str]] = {  # noqa: RUF012 - as PEFT has it
        "llama": ["o_proj", "down_proj"],
        "mamba": ["out_proj"],
        "vit": ["o_proj", "fc2"],
    }

    def _create_and_replace(
        self,
        peft_config: Any,  # SparseAdapterConfig
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target if isinstance(target, SparseAdapterLayer) else SparseAdapterLayer(target)
        layer.update_layer(adapter_name, peft_config, peft_config.units.get(current_key))
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own hands on `weight`, which a whole block does not have; ours is on the right device from the start.
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,  # SparseAdapterConfig
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        """In the type to be saved, and matrices with many zeros as `files.encode` has them."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        dtype = getattr(torch, config.save_dtype)
        saved: dict[str, Tensor] = {}
        for key, tensor in found.items():
            ours = _kind(key).startswith(cls.prefix)
            tensor = tensor.to(dtype) if ours and dtype != torch.float32 else tensor
            parts = files.encode(tensor) if _kind(key) in MATRICES else {}
            saved |= {f"{key}.{part}": value for part, value in parts.items()} or {key: tensor}
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Undo what `_get_adapter_state_dict` does. Raises ValueError where a file's parts do not fit together."""
        shapes = {
            cls._remove_adapter_name_from_key(key, adapter_name): tensor.shape
            for key, tensor in model.state_dict().items()
            if _kind(key) in MATRICES
        }
        whole = dict(state_dict)
        for key, shape in shapes.items():
            names = {part: f"{key}.{part}" for part in (files.VALUES, files.BITS, files.GAPS)}
            parts = {part: whole.pop(name) for part, name in names.items() if name in whole}
            if files.VALUES in parts and len(parts) == 2:
                whole[key] = files.decode(parts, shape)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, whole)


def _kind(key: str) -> str:
    """The part of a key that says what kind of tensor of ours it is; empty for tensors of others."""
    return next((part for part in key.split(".") if part.startswith(SparseAdapterModel.prefix)), "")
