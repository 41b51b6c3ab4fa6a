"""Models of pictures in the contract matrix: ViT, DINOv2 and ResNet, with its BatchNorm at rest and awake."""

from __future__ import annotations

from functools import partial

import torch

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

Pictures = partial(Row, architecture="image-classification")
Convolutions = partial(Pictures, recomputes=False)
"""Transformers' ResNet knows no gradient checkpointing."""


def tuner(kind: str, targets: tuple[str, ...] = (), **args: object) -> dict[str, object]:
    return {"type": kind, "targets": list(targets), "args": args}


class TestContract(MethodContract):
    rows = (
        Pictures("lora", {"r": 4}, "vit", base=tiny.vit),
        Pictures(
            "lora", {"r": 4, "targets": ["all"], "use_dora": True}, "dora", base=tiny.dinov2, exact_gradients=False
        ),
        Convolutions("lora", {"r": 4, "targets": ["conv"]}, "resnet", base=tiny.resnet),
        Convolutions("lora", {"r": 4}, "batch-norm", base=tiny.resnet_awake, exact_gradients=False),
        Pictures("linear_probe", label="vit", base=tiny.vit),
        Convolutions("linear_probe", label="resnet", base=tiny.resnet),
        Pictures("full", {"head_first": 0.3}, "vit", base=tiny.vit, dtype=torch.float32),
        Pictures("full", label="dinov2", base=tiny.dinov2, dtype=torch.float32),
        Convolutions("full", label="resnet", base=tiny.resnet, dtype=torch.float32),
        Pictures("kpsvd", {"rank": 2}, "vit", base=tiny.vit),
        Convolutions("kpsvd", {"rank": 2, "targets": ["conv.reduce", "conv.spatial"]}, "resnet", base=tiny.resnet),
        Convolutions("peft", tuner("LOKR", r=2), "lokr-resnet", base=tiny.resnet),
        Pictures(
            "peft", tuner("IA3", ("attention.k", "mlp.down"), feedforward_modules=["fc2"]), "ia3-vit", base=tiny.vit
        ),
        Pictures("peft", tuner("SHIRA", r=2), "shira-dinov2", base=tiny.dinov2),
    )
