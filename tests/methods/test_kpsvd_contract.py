"""KPSVD in the contract matrix: both bases, trained singular values, automatic ranks, the gradient, PiSSA's shapes."""

from __future__ import annotations

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

HEAD = "sequence-classification"


class TestContract(MethodContract):
    rows = (
        Row("kpsvd", {"rank": 2}),
        Row("kpsvd", {"rank": 2, "base": "delta", "targets": ["all"]}, "delta", architecture=HEAD),
        Row("kpsvd", {"rank": 3, "sigma": "trained", "alpha": 6.0}, "sigma"),
        Row("kpsvd", {"rank": "auto", "energy": 0.3, "targets": ["attention", "mlp.down"]}, "auto"),
        Row("kpsvd", {"rank": "auto", "budget": 3000, "base": "delta"}, "budget"),
        Row("kpsvd", {"rank": "auto", "max_rank": 4}, "calibrated", architecture=HEAD),
        Row("kpsvd", {"rank": "auto", "source": "gradient", "loss_increase": 0.5}, "gradient", base=tiny.mamba),
        Row("kpsvd", {"rank": 2}, "mamba", base=tiny.mamba),
        Row("kpsvd", {"rank": 4, "factors": "thin"}, "thin", architecture=HEAD),
    )
