"""A linear layer or convolution with trained Kronecker terms, for any number of adapters on one base.

The base's weight is left alone, and an adapter adds `sum U ⊗ V - sum U0 ⊗ V0`. A single adapter in residual mode has
its first terms taken out of the weight instead, so that only its own are added; the weight has its own bits again as
soon as another adapter comes, it is switched off, merged or unloaded. A weight in few bits, or one that another layer
has too, is never changed.

Letters: as in `maths`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.methods.kpsvd import maths
from peftcli.methods.kpsvd.config import KpsvdConfig
from peftcli.methods.kpsvd.function import KroneckerLayer, Product
from peftcli.methods.kpsvd.shapes import Split
from peftcli.methods.kpsvd.shift import Shift
from peftcli.methods.kpsvd.start import Start
from peftcli.models import packed


class KpsvdLayer(nn.Module, BaseTunerLayer):
    """Wraps a layer.

    Args:
        base_layer: Linear or Conv2d.

    Raises:
        UserError: A layer of another kind.
    """

    adapter_layer_names = ("kpsvd_U", "kpsvd_V", "kpsvd_S")
    other_param_names = ("kpsvd_U0", "kpsvd_V0", "kpsvd_S0", "scaling", "takes_out")
    cast_input_dtype_enabled = True  # a switch that PEFT's helpers look for; autocast alone casts here

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        check_kind(base_layer)
        self.base_layer: Any = base_layer
        self.kpsvd_U, self.kpsvd_V, self.kpsvd_S = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.kpsvd_U0, self.kpsvd_V0 = BufferDict(persistent=True), BufferDict(persistent=True)
        self.kpsvd_S0 = BufferDict(persistent=True)
        self.scaling: dict[str, float] = {}
        self.takes_out: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self._merges: dict[str, Shift] = {}
        self._residual: Shift | None = None
        self._residual_of: str | None = None

    def update_layer(
        self, adapter: str, config: KpsvdConfig, split: Split, terms: int, start: Start | None, takes_out: bool
    ) -> None:
        """Give the layer another adapter.

        Args:
            adapter: Its name.
            config: Of the adapter.
            split: Shapes of its factors.
            terms: How many it has.
            start: Where they start; None leaves them zero, to be loaded.
            takes_out: Take them out of the weight while the adapter is alone.
        """
        weight = self.base_layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        made: dict[str, Any] = {"dtype": dtype, "device": weight.device}
        scale = config.scale(terms)
        if start is None:
            U, V = torch.zeros(terms, split.m, split.n, **made), torch.zeros(terms, split.p, split.q, **made)
            S = torch.zeros(terms, **made)
        else:
            kept = list(start.kept)
            chosen = (start.terms.U[kept], start.terms.V[kept], start.terms.sigma[kept] / scale)
            U, V, S = (tensor.to(**made, copy=True) for tensor in chosen)
        if config.sigma == "absorbed":
            root_K11 = S.sqrt()[:, None, None]
            U, V = U * root_K11, V * root_K11
        if config.save_dtype == "bfloat16":
            # So that the first factors are saved without loss; see `KpsvdModel._get_adapter_state_dict`.
            U, V, S = (tensor.bfloat16().to(dtype) for tensor in (U, V, S))
        self.takes_out[adapter] = takes_out
        first = {"U0": U, "V0": V} | ({"S0": S} if config.sigma == "trained" else {})
        self.begin(adapter, first, scale, config.inference_mode)

    def begin(self, adapter: str, first: Mapping[str, Tensor], scale: float, inference_mode: bool = False) -> None:
        """Start an adapter at these factors, as `first` gives them."""
        self.put_back()
        self.scaling[adapter] = scale
        for key, tensor in first.items():
            getattr(self, f"kpsvd_{key}")[adapter] = tensor.clone()
            getattr(self, f"kpsvd_{key[0]}")[adapter] = nn.Parameter(tensor)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def first(self, adapter: str) -> dict[str, Tensor]:
        """Copies of the factors as they were at the start: U0 [K, M, N], V0 [K, P, Q] and, where trained, S0 [K]."""
        stored = {key: getattr(self, f"kpsvd_{key}") for key in ("U0", "V0", "S0")}
        return {key: tensors[adapter].clone() for key, tensors in stored.items() if adapter in tensors}

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """U with scale and singular values [K, M, N], and V [K, P, Q]."""
        return self._scaled(adapter, self.kpsvd_U, self.kpsvd_S), self.kpsvd_V[adapter]

    def first_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """As `factors`, as they were at the start."""
        return self._scaled(adapter, self.kpsvd_U0, self.kpsvd_S0), self.kpsvd_V0[adapter]

    def _scaled(self, adapter: str, U: Any, S: Any) -> Tensor:
        scale = self.scaling[adapter]
        if adapter in S:
            return U[adapter] * (S[adapter] * scale)[:, None, None]
        return U[adapter] if scale == 1.0 else U[adapter] * scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's outputs with its active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.kpsvd_U]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        base, product = self.base_layer, self._product(x)
        if packed.is_packed(base):
            y = base(x, *args, **kwargs)
        else:
            y = self._with(active.pop(0), x, base.weight, base.bias, product)
        for name in active:
            y = y + self._with(name, x, None, None, product).to(y.dtype)
        return y

    def _with(self, adapter: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, product: Product) -> Tensor:
        first = (None, None) if adapter == self._residual_of else self.first_factors(adapter)
        return KroneckerLayer.apply(x, *self.factors(adapter), weight, bias, *first, product)  # type: ignore[no-any-return]

    def _product(self, x: Tensor) -> Product:
        base, kind = self.base_layer, x.device.type
        lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        own = x.dtype if packed.is_packed(base) else base.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if lowered else own
        return Product(dtype, _geometry(base) if isinstance(base, nn.Conv2d) else None)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the untouched weight, in the weight's shape."""
        return maths.total(*self._change(adapter)).view(packed.shape(self.base_layer))

    def _change(self, adapter: str) -> tuple[Tensor, Tensor]:
        return maths.change(*self.factors(adapter), *self.first_factors(adapter))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight in place; see `BaseTunerLayer`.

        Raises:
            UserError: The weight is in few bits, and would be rounded to them again.
            ValueError: With `safe_merge`, the result is not finite.
        """
        packed.check_mergeable(self.base_layer)
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.kpsvd_U:
                self.put_back()
                self._merges[name] = Shift(self.base_layer.weight, *self._change(name), 1, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Give the weight its own bits back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._merges.pop(self.merged_adapters.pop()).undo(self.base_layer.weight)
        self._arrange()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with its own weight or the merged one; PEFT asks for it."""
        if merge:
            self.merge(safe_merge, adapter_names)
        self.put_back()
        return self.base_layer  # type: ignore[no-any-return]

    @torch.no_grad()
    def round_change(self, adapter: str) -> None:
        """Give the trained factors the values that come back from a bfloat16 file of their first values and changes."""
        for key, first in self.first(adapter).items():
            factor = getattr(self, f"kpsvd_{key[0]}")[adapter]
            factor.copy_(first + (factor - first).bfloat16())

    def settle(self, adapter: str) -> None:
        """Leave the weight as it is from now on."""
        self.takes_out[adapter] = False
        self._arrange()

    def put_back(self) -> None:
        """Give the weight its own bits where terms were taken out of it, until the next switch of adapters."""
        if self._residual is not None:
            self._residual.undo(self.base_layer.weight)
        self._residual = self._residual_of = None

    def _arrange(self) -> None:
        """Take the first terms out of the weight where this is wanted now, or put them back."""
        alone = len(self.kpsvd_U) == 1 and list(self.active_adapters) == list(self.kpsvd_U)
        name = next(iter(self.kpsvd_U)) if alone else ""
        wanted = name if alone and self.takes_out[name] and not self.disable_adapters and not self.merged else None
        if wanted == self._residual_of:
            return
        self.put_back()
        if wanted:
            weight = self.base_layer.weight
            self._residual = None if weight.is_meta else Shift(weight, *self.first_factors(wanted), -1)
            self._residual_of = wanted

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As of `BaseTunerLayer`."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._arrange()

    def enable_adapters(self, enabled: bool) -> None:
        """As of `BaseTunerLayer`."""
        super().enable_adapters(enabled)
        self._arrange()

    def delete_adapter(self, adapter_name: str) -> None:
        """As of `BaseTunerLayer`."""
        self.put_back()
        super().delete_adapter(adapter_name)
        self._arrange()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` works where there is a matrix to approximate."""
        return isinstance(self.base_layer, nn.Linear)

    def __repr__(self) -> str:
        return f"kpsvd.{super().__repr__()}"


def check_kind(layer: nn.Module) -> None:
    """Stop at layers that KPSVD does not adapt.

    Raises:
        UserError: See above.
    """
    if isinstance(layer, BaseTunerLayer):
        raise UserError(Mistake("KPSVD cannot go into a layer that has an adapter of another kind"))
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise UserError(Mistake(f"KPSVD adapts Linear and Conv2d layers, not {type(layer).__name__}"))
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        what = f"KPSVD adapts convolutions padded by a number of zeros, not padding={layer.padding!r}"
        raise UserError(Mistake(f"{what}, padding_mode={layer.padding_mode!r}"))


def _geometry(layer: nn.Conv2d) -> tuple[Any, ...]:
    return tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups
