"""A Mamba block with its selected channels and states trained, and LoRA on its projections.

While an adapter's selection is not made yet it is in its warm-up: it has a dense change G of A_log in place of the
selected values.

Shapes: B rows, L tokens, D channels, N states, K chosen channels, S chosen states of each, M = 2 N rows of x_proj that
make B and C, X pruned channels, P outputs and I inputs of a projection, r rank of LoRA.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.sdt import maths
from peftcli.methods.sdt.config import SdtConfig
from peftcli.methods.sdt.maths import Selection
from peftcli.models.mamba_mixer import mix


class SdtLayer(nn.Module, BaseTunerLayer):
    """Wraps a `MambaMixer`; any number of adapters, each with a selection of its own.

    Args:
        base_layer: The block.

    Raises:
        UserError: It is no Mamba block, or its A_log is in half precision.
    """

    adapter_layer_names = ("sdt_values", "sdt_lora_A", "sdt_lora_B", "sdt_warmup")
    other_param_names = ("sdt_channels", "sdt_states", "sdt_pruned", "scaling", "dropout")

    def __init__(self, base_layer: Any):
        super().__init__()
        if isinstance(base_layer, BaseTunerLayer) or not hasattr(base_layer, "A_log"):
            raise UserError(Mistake(f"SDT adapts Mamba's state-space blocks, not {type(base_layer).__name__}"))
        if base_layer.A_log.dtype in (torch.bfloat16, torch.float16):
            hint = (
                "A = -exp(A_log) would be off by up to 1 %; load it in float32 (peft does, from a float32 checkpoint)"
            )
            raise UserError(Mistake(f"SDT needs A_log in float32, and it is {base_layer.A_log.dtype}", hint=hint))
        self.base_layer: Any = base_layer
        # Each by adapter, then by the tensor's or projection's name in the block.
        self.sdt_values: Any = nn.ModuleDict()
        self.sdt_warmup: Any = nn.ModuleDict()
        self.sdt_lora_A: Any = nn.ModuleDict()
        self.sdt_lora_B: Any = nn.ModuleDict()
        self.sdt_channels, self.sdt_states, self.sdt_pruned = (BufferDict(persistent=True) for _ in range(3))
        self.scaling: dict[str, float] = {}
        self.dropout: Any = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._own: dict[str, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        D, N = self.base_layer.A_log.shape
        return D, N

    def update_layer(self, adapter: str, config: SdtConfig, sizes: list[int] | None) -> None:
        """Give the layer another adapter: ready for its indices where the sizes are known, else in its warm-up."""
        self.scaling[adapter] = config.alpha / config.r
        self.dropout[adapter] = nn.Dropout(config.dropout)
        self.sdt_lora_A[adapter], self.sdt_lora_B[adapter] = nn.ParameterDict(), nn.ParameterDict()
        for name in config.projections:
            weight_PI = getattr(self.base_layer, name).weight
            self.sdt_lora_A[adapter][name] = self._new(config.r, weight_PI.shape[1])
            self.sdt_lora_B[adapter][name] = self._new(weight_PI.shape[0], config.r)
        self.start_lora(adapter)
        if sizes is None:
            self.sdt_warmup[adapter] = nn.ParameterDict({"A_log": self._new(*self.shape)})
        else:
            self.choose(adapter, *maths.first(*sizes))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new(self, *shape: int) -> nn.Parameter:
        own = self.base_layer.A_log
        return nn.Parameter(torch.zeros(shape, dtype=own.dtype, device=own.device))

    def start_lora(self, adapter: str) -> None:
        """Draw LoRA's A anew (as `nn.Linear` does) and set its B to zero."""
        for name, A_rI in self.sdt_lora_A[adapter].items():
            nn.init.kaiming_uniform_(A_rI, a=math.sqrt(5))
            nn.init.zeros_(self.sdt_lora_B[adapter][name])

    def choose(self, adapter: str, selection: Selection, pruned_X: Tensor) -> None:
        """End the warm-up: train these channels and states from zero, and silence the pruned channels."""
        device, states = self.base_layer.A_log.device, self.shape[1]
        if adapter in self.sdt_warmup:
            del self.sdt_warmup[adapter]
        self.sdt_channels[adapter] = selection.channels_K.to(device, torch.int32)
        self.sdt_states[adapter] = selection.states_KS.to(device, torch.int32)
        self.sdt_pruned[adapter] = pruned_X.to(device, torch.int32)
        values = {"A_log": self._new(*selection.states_KS.shape)}
        values["x_proj"] = self._new(2 * states, len(selection.channels_K))
        self.sdt_values[adapter] = nn.ParameterDict(values)
        self.set_adapter(self.active_adapters)

    def selection(self, adapter: str) -> tuple[Selection, Tensor] | None:
        """The chosen channels and states, and the pruned channels; None within the warm-up."""
        if adapter not in self.sdt_values:
            return None
        indices = (self.sdt_channels[adapter], self.sdt_states[adapter], self.sdt_pruned[adapter])
        channels_K, states_KS, pruned_X = (tensor.long() for tensor in indices)
        return Selection(channels_K, states_KS), pruned_X

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """[B, L, E] -> [B, L, E] with the active adapters; see `models.mamba_mixer.mix`."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.scaling]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        A_log_DN = self.base_layer.A_log + sum(self._A_log_delta(name) for name in active)

        def project(name: str, x: Tensor) -> Tensor:
            return self._project(name, x, active)

        return mix(self.base_layer, hidden_states, cache_params, attention_mask, A_log_DN, project, self._kept(active))

    def _A_log_delta(self, adapter: str) -> Tensor:
        found = self.selection(adapter)
        if found is None:
            return self.sdt_warmup[adapter]["A_log"]
        return maths.scatter_A(self.sdt_values[adapter]["A_log"], found[0].channels_K, found[0].states_KS, self.shape)

    def _kept(self, adapters: list[str]) -> Tensor | None:
        pruned_X = [self.sdt_pruned[name].long() for name in adapters if name in self.sdt_pruned]
        if not any(map(len, pruned_X)):
            return None
        kept_D = torch.ones(self.shape[0], dtype=torch.bool, device=self.base_layer.A_log.device)
        kept_D[torch.cat(pruned_X)] = False
        return kept_D

    def _project(self, name: str, x_BLI: Tensor, adapters: list[str]) -> Tensor:
        """The sub-module's outputs with what the adapters add; both products with few columns, nothing dense."""
        module = getattr(self.base_layer, name)
        y_BLP = module(x_BLI)
        for adapter in adapters:
            if name in self.sdt_lora_A[adapter]:
                A_rI, B_Pr = self.sdt_lora_A[adapter][name], self.sdt_lora_B[adapter][name]
                dropped_BLI = self.dropout[adapter](x_BLI.to(A_rI.dtype))
                change_BLP = functional.linear(functional.linear(dropped_BLI, A_rI), B_Pr) * self.scaling[adapter]
                y_BLP = y_BLP + change_BLP.to(y_BLP.dtype)
            if name == "x_proj" and adapter in self.sdt_values:
                values_MK = self.sdt_values[adapter]["x_proj"]
                chosen_BLK = x_BLI.index_select(-1, self.sdt_channels[adapter])
                change_BLM = functional.linear(chosen_BLK.to(values_MK.dtype), values_MK).to(y_BLP.dtype)
                y_BLP = y_BLP + functional.pad(change_BLM, (y_BLP.shape[-1] - change_BLM.shape[-1], 0))
        return y_BLP

    def changes(self, adapter: str) -> dict[str, Tensor]:
        """What the adapter adds to the block's tensors, dense, by their names in the block."""
        found = self.selection(adapter)
        dense = {"A_log": self._A_log_delta(adapter)}
        for name, A_rI in self.sdt_lora_A[adapter].items():
            dense[f"{name}.weight"] = self.sdt_lora_B[adapter][name] @ A_rI * self.scaling[adapter]
        if found is not None:
            B_NK, C_NK = self.sdt_values[adapter]["x_proj"].chunk(2)
            scattered = maths.scatter_x(B_NK, C_NK, found[0].channels_K, tuple(self.base_layer.x_proj.weight.shape))
            dense["x_proj.weight"] = dense.get("x_proj.weight", 0) + scattered
        return dense

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the block's own tensors, which are kept for `unmerge`; see `BaseTunerLayer`.

        Raises:
            ValueError: With `safe_merge`, where a merged tensor is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.scaling:
                continue
            merged = {}
            for name, change in self.changes(adapter).items():
                tensor = self.base_layer.get_parameter(name)
                merged[name] = (tensor.to(change.dtype) + change).to(tensor.dtype)
            # Also what an adapter merged before has silenced, for this one may have filled its columns again.
            if (kept_D := self._kept([*self.merged_adapters, adapter])) is not None:
                weight_ED = merged.get("out_proj.weight", self.base_layer.out_proj.weight)
                merged["out_proj.weight"] = weight_ED.masked_fill(~kept_D, 0)
            if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
                raise ValueError(f"merging adapter {adapter!r} gives values that are not finite; nothing was merged")
            for name, tensor in merged.items():
                own = self.base_layer.get_parameter(name)
                self._own.setdefault(name, own.data)
                own.data = tensor
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the block its own tensors back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for name, tensor in self._own.items():
            self.base_layer.get_parameter(name).data = tensor
        self._own.clear()
        self.merged_adapters.clear()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        D, N = self.shape
        for kind, end in (("channels", D), ("states", N), ("pruned", D)):
            for name, indices in state_dict.items():
                if name.startswith(f"{prefix}sdt_{kind}.") and ((indices < 0) | (indices >= end)).any():
                    lists[-1].append(f"{name} has indices outside 0 to {end - 1}")

    def __repr__(self) -> str:
        return f"sdt.{super().__repr__()}"
