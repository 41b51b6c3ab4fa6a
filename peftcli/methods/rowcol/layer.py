"""A linear layer or convolution with a trained core between two frozen bases, for any number of adapters on one base.

    y = W x + s U R Vᵀ x          U [O, K] and V [I, K] fixed, R [K, K] trained from zero

A convolution reads its patches through V, as K filters of its own window, and puts out through U R, a 1x1 convolution.

Letters: O outputs, I inputs (of a convolution its channels times its window), K rank.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.rowcol import convolution
from peftcli.methods.rowcol.bases import Basis
from peftcli.methods.rowcol.config import RowcolConfig
from peftcli.models import packed


class RowcolLayer(nn.Module, BaseTunerLayer):
    """Wraps a layer.

    Args:
        base_layer: Linear or Conv2d.

    Raises:
        UserError: A layer of another kind.
    """

    adapter_layer_names = ("rowcol_R",)
    other_param_names = ("rowcol_U", "rowcol_V", "scaling")
    cast_input_dtype_enabled = True

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        check_kind(base_layer)
        self.base_layer: Any = base_layer
        self.rowcol_R: Any = nn.ParameterDict()
        self.rowcol_U: Any = BufferDict(persistent=True)
        self.rowcol_V: Any = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._own: Tensor | None = None

    def update_layer(self, adapter: str, config: RowcolConfig, rank: int, basis: Basis | None) -> None:
        """Give the layer another adapter, which changes nothing yet.

        Args:
            adapter: Its name.
            config: Of the adapter.
            rank: K.
            basis: Its bases; None leaves them zero, to be loaded.
        """
        weight = self.base_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        made: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        outputs, *inputs = packed.shape(self.base_layer)
        U_OK = torch.zeros(outputs, rank, **made)
        V_IK = torch.zeros(torch.Size(inputs).numel(), rank, **made)
        if basis is not None:
            U_OK, V_IK = (t[:, :rank].to(**made, copy=True).contiguous() for t in (basis.columns, basis.rows))
        if config.save_dtype == "bfloat16":
            U_OK, V_IK = (t.bfloat16().to(dtype) for t in (U_OK, V_IK))
        self.scaling[adapter] = config.scale(rank)
        self.rowcol_R[adapter] = nn.Parameter(torch.zeros(rank, rank, **made))
        self.put_bases(adapter, U_OK, V_IK)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def put_bases(self, adapter: str, U_OK: Tensor, V_IK: Tensor) -> None:
        """Give an adapter these bases."""
        self.rowcol_U[adapter], self.rowcol_V[adapter] = U_OK, V_IK

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's outputs with its active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y  # type: ignore[no-any-return]
        for adapter in self.active_adapters:
            if adapter in self.rowcol_R:
                y = y + self._change(adapter, x).to(y.dtype)
        return y  # type: ignore[no-any-return]

    def _change(self, adapter: str, x: Tensor) -> Tensor:
        """s U R Vᵀ x."""
        R_KK, U_OK, V_IK = self.rowcol_R[adapter], self.rowcol_U[adapter], self.rowcol_V[adapter]
        x = self._cast_input_dtype(x, R_KK.dtype)
        if not isinstance(self.base_layer, nn.Conv2d):
            z = functional.linear(functional.linear(x, V_IK.mT), self._scaled(adapter))
            return functional.linear(z, U_OK)
        base = self.base_layer
        filters = V_IK.mT.reshape(-1, *base.weight.shape[1:])
        z = functional.conv2d(x, filters, None, base.stride, base.padding, base.dilation)
        return functional.conv2d(z, (U_OK @ self._scaled(adapter))[:, :, None, None])

    def _scaled(self, adapter: str) -> Tensor:
        R_KK, scale = self.rowcol_R[adapter], self.scaling[adapter]
        return R_KK if scale == 1.0 else R_KK * scale  # type: ignore[no-any-return]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape."""
        product = self.rowcol_U[adapter] @ self._scaled(adapter) @ self.rowcol_V[adapter].mT
        return product.view(packed.shape(self.base_layer))  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight; see `BaseTunerLayer`.

        Raises:
            UserError: The weight is in few bits, and would be rounded to them again.
            ValueError: With `safe_merge`, the result is not finite.
        """
        packed.check_mergeable(self.base_layer)
        weight = self.base_layer.weight
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.rowcol_R:
                continue
            delta = self.get_delta_weight(adapter)
            merged = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError("NaNs or infinities in the merged weights; the adapter seems to be broken")
            self._own = weight.data if self._own is None else self._own
            weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Give the layer its own weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        elif self._own is not None:
            self.base_layer.weight.data = self._own.to(self.base_layer.weight)
        self._own = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` works where there is a matrix to approximate."""
        return isinstance(self.base_layer, nn.Linear)

    def __repr__(self) -> str:
        return f"rowcol.{super().__repr__()}"


def check_kind(layer: nn.Module) -> None:
    """Stop at layers without a row and a column space of their own.

    Raises:
        UserError: See above.
    """
    if isinstance(layer, BaseTunerLayer):
        raise UserError(Mistake("rowcol cannot go into a layer that has an adapter of another kind"))
    if why := convolution.cannot(layer):
        raise UserError(Mistake(f"rowcol cannot adapt a {type(layer).__name__}: {why}"))
