"""Sparse adapters in the contract matrix: units and weights, after, beside and around, linear ones that merge."""

from __future__ import annotations

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

HEAD, PICTURES = "sequence-classification", "image-classification"
SMALL = {"r": 6, "dropout": 0.0}


class TestContract(MethodContract):
    rows = (
        Row("sparse_adapter", SMALL),
        Row("sparse_adapter", {**SMALL, "structure": "weight", "gate": False}, "weight", architecture=HEAD),
        Row("sparse_adapter", {**SMALL, "placement": "parallel", "norm": True}, "parallel"),
        Row("sparse_adapter", {**SMALL, "activation": "linear"}, "linear", architecture=HEAD),
        Row("sparse_adapter", {**SMALL, "targets": ["block"], "last_blocks": 1, "wide": 2}, "block"),
        Row("sparse_adapter", SMALL, "mamba", base=tiny.mamba),
        Row("sparse_adapter", {**SMALL, "placement": "parallel"}, "mixer", base=tiny.mamba, architecture=HEAD),
        Row("sparse_adapter", SMALL, "vit", base=tiny.vit, architecture=PICTURES),
        Row("sparse_adapter", {**SMALL, "activation": "linear"}, "linear-mamba", base=tiny.mamba),
        Row("sparse_adapter", {**SMALL, "activation": "linear"}, "linear-vit", base=tiny.vit, architecture=PICTURES),
        Row("sparse_adapter", SMALL, "resnet", base=tiny.resnet, architecture=PICTURES, recomputes=False),
        Row(
            "sparse_adapter",
            {**SMALL, "placement": "parallel"},
            "around",
            base=tiny.resnet,
            architecture=PICTURES,
            recomputes=False,
        ),
        Row(
            "sparse_adapter",
            {**SMALL, "activation": "linear"},
            "folded",
            base=tiny.resnet,
            architecture=PICTURES,
            recomputes=False,
        ),
    )
