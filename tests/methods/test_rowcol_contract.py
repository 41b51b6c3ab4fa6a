"""Cores in the contract matrix: bases from data, weights and gradients, all rank rules, every family."""

from __future__ import annotations

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

HEAD, PICTURES = "sequence-classification", "image-classification"


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
    )
