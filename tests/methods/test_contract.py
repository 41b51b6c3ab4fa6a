"""Our methods and a choice of PEFT's tuners in the contract matrix."""

from __future__ import annotations

import torch

from peftcli.testing import tiny
from peftcli.testing.contract import MethodContract
from peftcli.testing.rows import Row

HEAD = "sequence-classification"


def tuner(kind: str, targets: tuple[str, ...] = (), **args: object) -> dict[str, object]:
    return {"type": kind, "targets": list(targets), "args": args}


class TestContract(MethodContract):
    rows = (
        Row("lora", {"r": 4}),
        Row("lora", {"r": 4, "targets": ["all"], "use_rslora": True}, "all", architecture=HEAD),
        Row("lora", {"r": 4, "use_dora": True}, "dora", exact_gradients=False),
        Row("lora", {"r": 4, "init": "pissa"}, "pissa", dtype=torch.float32),
        Row("lora", {"r": 4, "init": "olora", "use_rslora": True}, "olora", architecture=HEAD, dtype=torch.float32),
        Row("sdt", {"channels": 0.1}, base=tiny.mamba),
        Row(
            "sdt",
            {"selector": "magnitude", "channels": 5, "lora_targets": ["ssm.in", "ssm.x", "ssm.dt", "ssm.out"]},
            "warmed",
            base=tiny.mamba,
        ),
        Row(
            "sdt", {"selector": "random", "states": 1, "lora_targets": []}, "alone", base=tiny.mamba, architecture=HEAD
        ),
        Row("sdt", {"pruned": 9, "channels": "auto", "states": "auto"}, "pruned", base=tiny.mamba),
        Row("lora", {"r": 4}, "mamba", base=tiny.mamba),
        Row("full", base=tiny.mamba, label="mamba", dtype=torch.float32),
        Row("linear_probe", architecture=HEAD),
        Row("linear_probe", base=tiny.mamba, architecture=HEAD, label="mamba"),
        Row("full", {"head_first": 0.3}, dtype=torch.float32),
        Row("peft", tuner("LOKR", r=2), "lokr"),
        Row("peft", tuner("LOKR", ("ssm.in", "ssm.out"), r=2), "lokr-mamba", base=tiny.mamba),
        Row("peft", tuner("IA3"), "ia3", architecture=HEAD),
        Row("peft", tuner("VERA", ("attention.q", "attention.o"), r=4), "vera"),
        Row("peft", tuner("SHIRA", r=2), "shira"),
        Row("peft", tuner("ADALORA"), "adalora"),
        Row("peft", tuner("PROMPT_TUNING", num_virtual_tokens=3), "prompt"),
        Row("peft", tuner("PREFIX_TUNING", num_virtual_tokens=3), "prefix"),
    )
