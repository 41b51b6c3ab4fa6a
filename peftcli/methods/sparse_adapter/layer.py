"""A module of the base with bottlenecks at its side, for any number of adapters on one base.

    A(h) = h + U (gate * f(D n(x) + b)) + c          x = h after the base's module, or what that module reads

Pruned units and weights are out of the function, not just zero: no gradient reaches them.

Shapes: B rows, T tokens, H and W pixels, I channels read, E channels put out, R units.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from peftcli.methods.sparse_adapter import places
from peftcli.methods.sparse_adapter.config import SparseAdapterConfig

LIVE = ("units", "down", "up")
"""What pruning says of a module: which units, or which weights, are left."""
LANES = 8
"""Units are computed with in multiples of this."""
KINDS = ("down", "up", "down_bias", "up_bias", "gate", "norm_weight", "norm_bias")
COMPUTED = ("down", "down_bias", "up", "up_bias", "gate")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "linear": lambda x: x,
}


class SparseAdapterLayer(nn.Module, BaseTunerLayer):
    """Wraps a linear layer, a convolution or a larger part.

    Args:
        base_layer: What is wrapped.

    Raises:
        UserError: It is of a kind that takes none.
    """

    adapter_layer_names = tuple(f"sparse_{kind}" for kind in KINDS)
    other_param_names = (
        "sparse_live_units", "sparse_live_down", "sparse_live_up", "sparse_live_index", "units", "configs",
    )  # fmt: skip
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: Any):
        super().__init__()
        self.geometry = places.geometry(base_layer)
        self.base_layer: Any = base_layer
        self.sparse_down: Any = nn.ParameterDict()
        self.sparse_up: Any = nn.ParameterDict()
        self.sparse_down_bias: Any = nn.ParameterDict()
        self.sparse_up_bias: Any = nn.ParameterDict()
        self.sparse_gate: Any = nn.ParameterDict()
        self.sparse_norm_weight: Any = nn.ParameterDict()
        self.sparse_norm_bias: Any = nn.ParameterDict()
        # Boolean, of what pruning has left; there are none before it, and no file has them.
        self.sparse_live_units: Any = BufferDict()
        self.sparse_live_down: Any = BufferDict()
        self.sparse_live_up: Any = BufferDict()
        self.sparse_live_index: Any = BufferDict()
        """Units to compute with, which follow from `sparse_live_units`."""
        self.units: dict[str, list[int]] = {}
        self.configs: dict[str, SparseAdapterConfig] = {}
        self.merged_adapters: list[str] = []
        self._own: dict[str, Tensor] = {}

    def update_layer(self, adapter: str, config: SparseAdapterConfig, units: list[int] | None) -> None:
        """Give the layer another adapter, which changes nothing yet: U and both biases are zero.

        Args:
            adapter: Its name.
            config: Of the adapter.
            units: Those it has left; all where None.
        """
        found = self.geometry
        self.units[adapter] = list(range(config.r)) if units is None else list(units)
        self.configs[adapter] = config
        R, E = len(self.units[adapter]), found.outputs
        reads = found.inputs if config.placement == "parallel" else E
        tensors = {"down": self._filled(0, R, reads), "up": self._filled(0, E, R)}
        if R:
            nn.init.kaiming_uniform_(tensors["down"], a=math.sqrt(5))
        if config.activation != "linear":
            tensors |= {"down_bias": self._filled(0, R), "up_bias": self._filled(0, E)}
        if config.gate:
            tensors["gate"] = self._filled(1, R)
        if config.norm:
            tensors |= {"norm_weight": self._filled(1, reads), "norm_bias": self._filled(0, reads)}
        for kind, tensor in tensors.items():
            self.of(kind)[adapter] = nn.Parameter(tensor)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _filled(self, value: float, *shape: int) -> Tensor:
        own = next(self.base_layer.parameters())
        dtype = torch.promote_types(own.dtype, torch.float32) if own.is_floating_point() else torch.float32
        return torch.full(shape, value, dtype=dtype, device=own.device)

    def of(self, kind: str) -> Any:
        """The tensors of a kind, by adapter."""
        return getattr(self, f"sparse_{kind}")

    def tensor(self, kind: str, adapter: str) -> Any:
        """A tensor of the adapter's, or None where it has none of that kind."""
        held: Any = self._modules[f"sparse_{kind}"]  # past both dictionaries' slow access: each forward pass comes here
        return held._parameters.get(adapter, held._buffers.get(adapter))

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's tensors by kind."""
        return {kind: self.of(kind)[adapter] for kind in KINDS if adapter in self.of(kind)}

    def live(self, kind: str, adapter: str) -> Tensor | None:
        """What pruning has left of `units` [R], `down` [R, I] or `up` [E, R], boolean; None before any."""
        return self.tensor(f"live_{kind}", adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's module puts out, changed by the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        active = [name for name in self.active_adapters if name in self.units]
        if self.disable_adapters or self.merged or not active:
            return output
        h = output[0] if isinstance(output, tuple) else output
        for name in active:
            parallel = self.configs[name].placement == "parallel"
            change = self._change(name, (args[0] if args else kwargs["hidden_states"]) if parallel else h).to(h.dtype)
            h = change.add_(h.reshape(change.shape)).view(h.shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        """U (gate * f(D n(x) + b)) + c in a tensor of its own, no view, so that h can be added in place: [B, E, H, W],
        or [N, E] of N tokens in all rows."""
        config, stride = self.configs[adapter], self.geometry.stride
        D_RI, b_R, U_ER, c_E = self.effective(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # autocast would cast it once more
            x = self._cast_input_dtype(x, D_RI.dtype)
        if config.norm:
            x = _normalise(x, self.sparse_norm_weight[adapter], self.sparse_norm_bias[adapter], stride is not None)
        share = config.dropout if self.training else 0.0
        if stride is None:
            z_NR = ACTIVATIONS[config.activation](functional.linear(x.reshape(-1, x.shape[-1]), D_RI, b_R))
            return functional.linear(_drop(z_NR, share, x.shape[0]), U_ER, c_E)
        if not len(D_RI):  # a bias is left; convolutions have at least one channel
            D_RI, b_R, U_ER = D_RI.new_zeros(1, x.shape[1]), None, U_ER.new_zeros(len(U_ER), 1)
        step = stride if config.placement == "parallel" else 1
        z = ACTIVATIONS[config.activation](functional.conv2d(x, D_RI[:, :, None, None], b_R, stride=step))
        return functional.conv2d(_drop(z, share), U_ER[:, :, None, None], c_E)

    def effective(self, adapter: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """D [R, I], b [R], U with the gates in it [E, R] and c [E], without what is pruned: of the live units, perhaps
        with a few that are zero, or all zero where none is live."""
        D_RI, b_R, U_ER, c_E, gate_R = (self.tensor(kind, adapter) for kind in COMPUTED)
        alive: bool | Tensor = True
        if (index := self.live("index", adapter)) is not None:
            alive = len(index) > 0
            if alive:  # else all of it is zero already
                D_RI, U_ER = D_RI.index_select(0, index), U_ER.index_select(1, index)
                b_R, gate_R = (None if one is None else one.index_select(0, index) for one in (b_R, gate_R))
        if (down_RI := self.live("down", adapter)) is not None:
            up_ER = self.sparse_live_up[adapter]
            D_RI, U_ER, alive = D_RI * down_RI, U_ER * up_ER, down_RI.any() | up_ER.any()
        if alive is not True and c_E is not None:
            c_E = c_E * alive  # what has no unit left is gone as a whole
        return D_RI, b_R, U_ER if gate_R is None else U_ER * gate_R, c_E

    @torch.no_grad()
    def prune(self, adapter: str, live: dict[str, Tensor]) -> None:
        """Leave only these units [R] (`units`) or weights (`down` [R, I] and `up` [E, R]); the others become zero."""
        for kind, mask in live.items():
            self.of(f"live_{kind}")[adapter] = mask.to(self.sparse_down[adapter].device)
        self._index(adapter)
        tensors = self.tensors(adapter)
        for kind, mask in self.masks(adapter).items():
            if kind in tensors:
                tensors[kind].masked_fill_(~mask, 0)

    def masks(self, adapter: str) -> dict[str, Tensor]:
        """What is live of each tensor that pruning touches, boolean, in shapes that broadcast; empty before any."""
        found: dict[str, Tensor] = {}
        if (units_R := self.live("units", adapter)) is not None:
            found = {"down": units_R[:, None], "up": units_R[None], "down_bias": units_R, "gate": units_R}
            found["up_bias"] = units_R.any()
        if (down_RI := self.live("down", adapter)) is not None:
            up_ER = self.live("up", adapter)
            assert up_ER is not None
            found = {"down": down_RI, "up": up_ER, "up_bias": down_RI.any() | up_ER.any()}
        return found

    @torch.no_grad()
    def resize(self, adapter: str, keep: list[int]) -> None:
        """Keep these units (places in the present order) and drop the others from memory."""
        index = torch.tensor(keep, dtype=torch.long, device=self.sparse_down[adapter].device)
        for kind, axis in (("down", 0), ("up", 1), ("down_bias", 0), ("gate", 0)):
            if adapter in self.of(kind):
                old = self.of(kind)[adapter]
                self.of(kind)[adapter] = nn.Parameter(old.index_select(axis, index), old.requires_grad)
        for kind, axis in (("live_units", 0), ("live_down", 0), ("live_up", 1)):
            if adapter in self.of(kind):
                self.of(kind)[adapter] = self.of(kind)[adapter].index_select(axis, index)
        self._index(adapter)
        self.units[adapter] = [self.units[adapter][place] for place in keep]

    def revive(self, adapter: str) -> None:
        """Forget what was pruned: all that there is is live."""
        for kind in (*LIVE, "index"):
            if adapter in self.of(f"live_{kind}"):
                del self.of(f"live_{kind}")[adapter]

    def _index(self, adapter: str) -> None:
        if (units_R := self.live("units", adapter)) is None:
            return
        live = units_R.nonzero().flatten()
        # Filled up with pruned units, which are zero: each new size has to be planned by the CPU's kernels anew.
        fill = (~units_R).nonzero().flatten()[: -len(live) % LANES]
        self.sparse_live_index[adapter] = torch.cat([live, fill]).sort().values if len(live) else live

    def remove(self, adapter: str) -> None:
        """Take the adapter out of this layer alone, and leave it active elsewhere."""
        for attribute in self.adapter_layer_names + self.other_param_names:
            if adapter in getattr(self, attribute):
                del getattr(self, attribute)[adapter]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold linear adapters into the layer: W <- (I + U gate D) W, and its bias likewise; see `BaseTunerLayer`.

        Raises:
            NotImplementedError: An adapter that is not linear, or not right after a layer.
            ValueError: With `safe_merge`, where a merged tensor is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.sparse_down:
                continue
            self._check_folds(adapter)
            D_RI, _, U_ER, _ = self.effective(adapter)
            merged = {}
            for name, tensor in self.base_layer.named_parameters():
                flat = tensor.to(D_RI.dtype).flatten(1) if tensor.ndim > 1 else tensor.to(D_RI.dtype)
                merged[name] = (flat + U_ER @ (D_RI @ flat)).view_as(tensor).to(tensor.dtype)
            if safe_merge and not all(tensor.isfinite().all() for tensor in merged.values()):
                raise ValueError(f"NaNs or infinities: merging {adapter!r} gives values that are not finite")
            for name, tensor in merged.items():
                own = self.base_layer.get_parameter(name)
                self._own.setdefault(name, own.data)
                own.data = tensor
            self.merged_adapters.append(adapter)

    def _check_folds(self, adapter: str) -> None:
        config = self.configs[adapter]
        if config.activation != "linear" or config.norm:
            raise NotImplementedError("a nonlinear module has no place in the base's weights; its file is compact")
        if config.placement == "parallel" or not isinstance(self.base_layer, nn.Linear | nn.Conv2d):
            raise NotImplementedError("only a linear module right after a linear layer or convolution folds into it")
        if getattr(self.base_layer, "groups", 1) > 1:
            raise NotImplementedError("a convolution in groups has no weights between them, which the module needs")

    def unmerge(self) -> None:
        """Give the layer its own tensors back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for name, tensor in self._own.items():
            self.base_layer.get_parameter(name).data = tensor
        self._own.clear()
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"sparse_adapter.{super().__repr__()}"


def _drop(z: Tensor, share: float, rows: int = 0) -> Tensor:
    """Drop this share of the units, each for a row as a whole: the mask is small, and drawing it costs nothing."""
    R = z.shape[1]
    if not share or not R:
        return z
    kept_BR = z.new_empty(rows or len(z), R).bernoulli_(1 - share).div_(1 - share)
    if rows:
        return (z.view(rows, -1, R) * kept_BR[:, None]).view(-1, R)
    return z * kept_BR[:, :, None, None]


def _normalise(x: Tensor, weight_I: Tensor, bias_I: Tensor, channels_second: bool) -> Tensor:
    x = x.movedim(1, -1) if channels_second else x
    x = functional.layer_norm(x, (len(weight_I),), weight_I, bias_I)
    return x.movedim(-1, 1) if channels_second else x
