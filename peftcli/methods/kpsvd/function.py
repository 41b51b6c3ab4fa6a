"""A frozen layer with trained Kronecker terms beside its weight, as one step of autograd.

Nothing of the weight's size outlives the forward pass: what is formed is let go and formed again on the way back.

Letters: as in `maths`; B leading sizes of a batch, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftcli.methods.kpsvd import maths, plan


@dataclass(frozen=True)
class Product:
    """What a layer does with its weight; `None` for `conv` is a linear layer."""

    dtype: torch.dtype
    """Type of the arithmetic."""
    conv: tuple[Any, ...] | None = None
    """Shape of the kernel, stride, padding, dilation and groups."""

    def __call__(self, x: Tensor, weight_OI: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's outputs."""
        if self.conv is None:
            return nn.functional.linear(x, weight_OI, bias)
        kernel, *rest = self.conv
        return nn.functional.conv2d(x, weight_OI.view(kernel), bias, *rest)

    def input_gradient(self, x: Tensor, weight_OI: Tensor, g: Tensor) -> Tensor:
        """The gradient of the inputs where `g` is that of the outputs."""
        return g @ weight_OI if self.conv is None else self._backward(x, weight_OI, g, 0)

    def weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the weight [O, I]."""
        if self.conv is None:
            return g.mT @ x
        return self._backward(x, x.new_empty(1).expand(self.conv[0]), g, 1).flatten(1)

    def _backward(self, x: Tensor, weight: Tensor, g: Tensor, which: int) -> Tensor:
        assert self.conv is not None
        kernel, stride, padding, dilation, groups = self.conv
        mask = [place == which for place in range(3)]
        geometry = (None, stride, padding, dilation, False, [0, 0], groups)
        return torch.ops.aten.convolution_backward(g, x, weight.view(kernel), *geometry, mask)[which]


class KroneckerLayer(torch.autograd.Function):
    """y = layer(x, W + sum_k U_k ⊗ V_k - sum_k U0_k ⊗ V0_k) + bias, with gradients for x, U and V; W may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, V: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        """`rest` is the bias, U0 and V0 (all may be None) and the `Product`."""
        bias, U0, V0, product = rest
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(product.dtype)
            inner = x if product.conv else x.flatten(0, -2)
            ctx.save_for_backward(inner, U, V, weight, U0, V0)
            ctx.product, ctx.shape = product, x.shape
            bias = None if bias is None else bias.to(product.dtype)
            y = _forward(product, inner, _parts(product, inner, weight, _terms(U, V, U0, V0), U0 is not None), bias)
            return y if product.conv else y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, U and V."""
        x, U, V, weight, U0, V0 = ctx.saved_tensors
        product, (wants_x, wants_U, wants_V) = ctx.product, ctx.needs_input_grad[:3]
        dx = dU = dV = None
        with torch.autocast(x.device.type, enabled=False):
            g = g.to(product.dtype)
            g = g if product.conv else g.flatten(0, -2)
            if wants_x:
                parts = _parts(product, x, weight, _terms(U, V, U0, V0), U0 is not None)
                dx = _backward(product, x, parts, g).view(ctx.shape)
            if wants_U or wants_V:
                dU, dV = _factor_gradients(product, x, g, U, V)
        return dx, dU, dV, None, None, None, None, None


def _terms(U: Tensor, V: Tensor, U0: Tensor | None, V0: Tensor | None) -> tuple[Tensor, Tensor]:
    return (U, V) if U0 is None or V0 is None else maths.change(U, V, U0, V0)


Parts = tuple[list[Tensor], tuple[Tensor, Tensor] | None]
"""Matrices whose products add up, and the terms that are applied through their factors."""


def _parts(product: Product, x: Tensor, weight: Tensor | None, terms: tuple[Tensor, Tensor], small: bool) -> Parts:
    """How to compute with the weight and the terms.

    Args:
        product: The layer.
        x: Its inputs; their number decides.
        weight: The base's; None for what is added to it alone.
        terms: Factors of what is added to it.
        small: The terms are a change that may be far smaller than the weight: a half-precision sum would lose it.
    """
    dtype = product.dtype
    if weight is None:
        if product.conv or plan.forms_product(len(x), len(terms[0]), maths.split_of(*terms), False):
            return [maths.add(None, *terms, dtype)], None
        return [], (terms[0].to(dtype), terms[1].to(dtype))
    weight_OI = weight.flatten(1)
    folds = not small or weight.element_size() >= 4
    if product.conv or plan.forms_product(len(x), len(terms[0]), maths.split_of(*terms), folds):
        if folds:
            return [maths.add(weight_OI, *terms, dtype)], None
        return [weight_OI.to(dtype), maths.add(None, *terms, dtype)], None
    return [weight_OI.to(dtype)], (terms[0].to(dtype), terms[1].to(dtype))


def _forward(product: Product, x: Tensor, parts: Parts, bias: Tensor | None) -> Tensor:
    matrices, factors = parts
    if not matrices and factors:
        return maths.apply(x, *factors)
    y = product(x, matrices[0], bias)
    for more in matrices[1:]:
        y += product(x, more, None)
    return y if factors is None else y.add_(maths.apply(x, *factors))


def _backward(product: Product, x: Tensor, parts: Parts, g: Tensor) -> Tensor:
    matrices, factors = parts
    if not matrices and factors:
        return maths.apply_transposed(g, *factors)
    dx = product.input_gradient(x, matrices[0], g)
    for more in matrices[1:]:
        dx += product.input_gradient(x, more, g)
    return dx if factors is None else dx.add_(maths.apply_transposed(g, *factors))


def _factor_gradients(product: Product, x: Tensor, g: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    low = (U.to(product.dtype), V.to(product.dtype))
    if product.conv or plan.forms_gradient(len(x), len(U), maths.split_of(U, V)):
        found = maths.gradients(product.weight_gradient(x, g), *low)
    else:
        found = maths.gradients_through_factors(x, g, *low)
    return found[0].to(U.dtype), found[1].to(V.dtype)
