"""Mamba (S6 blocks) as Transformers names it."""

from __future__ import annotations

from peftcli.models.family import Family

FAMILY = Family(
    name="mamba",
    model_types=("mamba",),
    roles={
        "ssm.in": r"in_proj",
        "ssm.x": r"x_proj",
        "ssm.dt": r"dt_proj",
        "ssm.out": r"out_proj",
        "ssm.conv": r"conv1d",
        "ssm.A": r"A_log",
        "ssm.D": r"mixer\.D",
        "embed": r"embeddings",
        "norm": r"norm|norm_f",
        "head": r"lm_head|score",
    },
    default_targets=("ssm.in", "ssm.out"),
    blocks=r"layers\.\d+",
)
