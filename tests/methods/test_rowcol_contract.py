"""Cores and compressed models in the contract matrix: all bases and rank rules, every family."""

from __future__ import annotations

import torch

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

HEAD, PICTURES = "sequence-classification", "image-classification"
COMPRESS = {"mode": "compress", "target": {"parameters": "60%"}}
WEIGHTS = {**COMPRESS, "basis": "weight"}  # a dozen positions show too little of the texts' models
SMALLER = {"dtype": torch.float32}


class TestContract(MethodContract):
    rows = (
        Row("rowcol", {"rank": 4}),
        Row("rowcol", {"rank": 5, "basis": "weight", "targets": ["all"], "alpha": 10.0}, "weight", architecture=HEAD),
        Row("rowcol", {"rank": 4, "basis": "gradient", "targets": ["attention", "mlp.down"]}, "gradient"),
        Row("rowcol", {"rank": "auto", "energy": 0.5, "targets": ["attention"]}, "energy", architecture=HEAD),
        Row("rowcol", {"rank": "auto", "budget": 200, "worth": "sensitivity", "basis": "weight"}, "budget"),
        Row("rowcol", {"rank": 4, "targets": ["all"]}, "mamba", base=tiny.mamba),
        Row("rowcol", {"rank": 4, "targets": ["all"]}, "vit", base=tiny.vit, architecture=PICTURES),
        Row(
            "rowcol",
            {"rank": "auto", "budget": 300, "targets": ["conv"]},
            "resnet",
            base=tiny.resnet,
            architecture=PICTURES,
            recomputes=False,
        ),
        Row("rowcol", COMPRESS, "compress-vit", base=tiny.vit, architecture=PICTURES, **SMALLER),
        Row("rowcol", {**COMPRESS, "prune": 0.2}, "prune-dinov2", base=tiny.dinov2, architecture=PICTURES, **SMALLER),
        Row(
            "rowcol",
            {**COMPRESS, "worth": "sensitivity"},
            "compress-resnet",
            base=tiny.resnet,
            architecture=PICTURES,
            recomputes=False,
            **SMALLER,
        ),
        Row("rowcol", WEIGHTS, "compress-llama", **SMALLER),
        Row("rowcol", {**WEIGHTS, "target": {"flops": "60%"}}, "compress-mamba", base=tiny.mamba, **SMALLER),
    )
