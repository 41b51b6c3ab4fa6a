"""Bases in 4 or 8 bits through bitsandbytes: packed matrix by matrix as they are read or drawn, and made whole again.

The output layer and the embedding stay whole, as does a classification head.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from peftcli.config.errors import Mistake, UserError
from peftcli.models import outline, packed

PIP = "pip install 'peftcli[quantized]'"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""Of Transformers' `BitsAndBytesConfig`, by `model.quantization`."""
PROBE = 64
"""Width of the layer that is tried first."""


@cache
def check(kind: str, device: str) -> None:
    """Try the backend once: pack a layer, multiply with it, and take the gradient.

    Raises:
        UserError: bitsandbytes is not here, or cannot do this on the device.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        what = f"model.quantization={kind} needs the package bitsandbytes"
        raise UserError(Mistake(what, "model.quantization", hint=PIP)) from error
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # each product of 8-bit layers says that it rounds
    try:
        layer = _pack(nn.Linear(PROBE, PROBE, device=device).requires_grad_(False), kind, torch.float32)
        x = torch.ones(2, PROBE, device=device, requires_grad=True)
        layer(x).sum().backward()
    except Exception as error:  # each backend fails in its own way
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"model.quantization={kind}: bitsandbytes cannot compute on {device} here: {first}"
        hint = "model.quantization=null, or other hardware"
        raise UserError(Mistake(what, "model.quantization", hint=hint)) from error


def settings(kind: str, dtype: torch.dtype) -> Any:
    """Transformers' `BitsAndBytesConfig` for arithmetic in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**ARGUMENTS[kind], bnb_4bit_compute_dtype=dtype)


def steady(model: nn.Module) -> None:
    """Make evaluation on a CPU compute what training does, with the bits as they are.

    Where there are bf16 instructions bitsandbytes would pack 4-bit weights anew for evaluation, into an order whose
    product has no gradient when training goes on. Of 8-bit layers it would round the inputs to 8 bits in evaluation
    alone, by what else is in the batch. On GPUs both modes do that.
    """
    from bitsandbytes import MatmulLtState

    class AsInTraining(MatmulLtState):
        is_training = property(lambda _: True, lambda *_: None)

    for _, layer in packed.layers(model):
        if hasattr(layer, "compute_dtype"):
            layer.support_avx512bf16_for_cpu = False
        elif layer.weight.device.type == "cpu":
            layer.state.__class__ = AsInTraining


def check_sizes(model: nn.Module) -> None:
    """Refuse what bitsandbytes 0.50.2 reads back wrongly, without a word: see the error.

    Raises:
        UserError: A 4-bit matrix on the CPU has rows that end inside a block of values with one scale.
    """
    for name, layer in packed.layers(model):
        if hasattr(layer, "compute_dtype") and layer.weight.device.type == "cpu" and layer.in_features % outline.BLOCK:
            what = (
                f"{name} has {layer.in_features} inputs; on a CPU bitsandbytes reads 4-bit matrices wrongly unless "
                f"these are a multiple of {outline.BLOCK}"
            )
            raise UserError(Mistake(what, "model.quantization", hint="model.quantization=int8, or a GPU"))


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Multiply in this type from now on (4-bit layers; 8-bit ones follow their inputs)."""
    for _, layer in packed.layers(model):
        layer.compute_dtype = dtype


def draw(model: Any, bits: Any, device: str, dtype: torch.dtype) -> None:
    """Give a model on the meta device random weights, matrix by matrix, so that it is never whole in memory.

    Args:
        model: As Transformers builds it; changed in place.
        bits: From `settings`.
        device: Where the weights go.
        dtype: Of the weights before they are packed, and of those that stay whole.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    model.hf_quantizer = AutoHfQuantizer.from_config(bits)
    model.hf_quantizer.preprocess_model(model, device_map={"": device})
    for _, module in list(model.named_modules()):
        if _is_ours(module):
            sizes = (module.in_features, module.out_features, module.bias is not None)
            plain = nn.Linear(*sizes, device=device, dtype=dtype)
            model._init_weights(plain)
            _take(module, plain.requires_grad_(False))
        elif module._parameters or module._buffers:
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)
    model.tie_weights()
    model.hf_quantizer.postprocess_model(model)


def unpack(model: Any) -> None:
    """Make every packed layer a plain one in float32, in place; the model is then like any other."""
    for name, layer in list(packed.layers(model)):
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(packed.weight(layer), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _pack(layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """The layer in few bits, on its own device."""
    import bitsandbytes as bnb

    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    with torch.device("meta"):
        made: Any = (
            bnb.nn.Linear4bit(*sizes, dtype, quant_type="nf4")
            if kind == "nf4"
            else bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        )
    _take(made, layer)
    return made  # type: ignore[no-any-return]


def _is_ours(module: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' layers, packed or still to be."""
    import bitsandbytes as bnb

    return isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def _take(made: Any, layer: nn.Linear) -> None:
    """Give one of bitsandbytes' layers on the meta device the contents of a plain one; moving them packs them."""
    empty = made.weight
    values = layer.weight.data.to("cpu") if hasattr(empty, "SCB") else layer.weight.data
    made.weight = type(empty)(values, requires_grad=False, **vars(empty)).to(layer.weight.device)
    made.bias = layer.bias
