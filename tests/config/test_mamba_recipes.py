"""The Mamba recipes: the published settings, matched budgets, and rehearsals with random weights and no network."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from peftcli.config import catalog
from peftcli.config.compose import compose

SIXES = {
    "glue-rte": ("mamba-130m", 1e-3, 2e-3, 10, 250, "fp32"),
    "glue-mrpc": ("mamba-130m", 2e-3, 1e-3, 10, 500, "fp32"),
    "glue-cola": ("mamba-130m", 1e-3, 1e-3, 10, 500, "fp32"),
    "glue-sst2": ("mamba-130m", 1e-3, 1e-3, 10, 500, "fp32"),
    "glue-qnli": ("mamba-130m", 1e-3, 1e-3, 10, 500, "fp32"),
    "glue-qqp": ("mamba-130m", 1e-3, 1e-3, 3, 500, "fp32"),
    "glue-mnli": ("mamba-130m", 1e-3, 1e-3, 3, 500, "fp32"),
    "dart": ("mamba-130m", 4e-3, 4e-3, 10, 500, "bf16"),
    "samsum": ("mamba-1.4b", 4e-4, 4e-4, 10, 500, "bf16"),
    "spider": ("mamba-1.4b", 2e-3, 2e-3, 10, 500, "bf16"),
}
"""Base, rates of SDT and of LoRA, epochs, warm-up steps and precision of the published runs (4 of 16 states)."""
TRAINED = {"mamba-130m": 470_400, "mamba-1.4b": 2_496_000}
"""Of LoRA: rank 5 on out_proj and the whole x_proj; SDT has 455,328 and 2,430,144."""
ROWS = {
    "sentence1": "the cat sat", "sentence2": "a cat sat", "sentence": "it was good", "question": "who sat?",
    "question1": "who?", "question2": "which one?", "premise": "a cat sat", "hypothesis": "a cat",
    "tripleset": [["cat", "DOES", "sit"]], "target": "The cat sits.", "dialogue": "A: hi\nB: hi",
    "summary": "They greet.", "db_id": "zoo", "query": "SELECT 1",
}  # fmt: skip
TINY = [
    "model.weights=random", "model.shape.hidden_size=32", "model.shape.num_hidden_layers=2", "model.shape.state_size=4",
    "model.shape.vocab_size=300", "training.max_steps=2", "training.eval_every=end", "launch.device=cpu",
    "launch.threads=1",
]  # fmt: skip


def test_each_data_set_has_both_methods() -> None:
    names = {name.removeprefix("mamba/") for name in catalog.recipes() if name.startswith("mamba/")}
    assert names >= {f"{data}_{method}" for data in SIXES for method in ("sdt", "lora")}


@pytest.mark.parametrize("data", SIXES)
def test_settings_are_the_published_ones(data: str) -> None:
    base, sdt_lr, lora_lr, epochs, warmup, precision = SIXES[data]
    for method, lr in (("sdt", sdt_lr), ("lora", lora_lr)):
        config = compose(f"mamba/{data}_{method}").config
        assert config.model.name == f"state-spaces/{base}-hf"
        optim, training = config.optim, config.training
        assert (optim.lr, optim.schedule, optim.warmup_share, optim.weight_decay) == (lr, "linear", 0, 0)
        assert (training.epochs, training.batch_size, training.precision) == (epochs, 4, precision)
        assert config.method.dropout == 0.1
        if method == "sdt":
            sdt = config.method
            assert (sdt.selector, sdt.warmup, sdt.channels, sdt.states) == ("magnitude", warmup, 0.01, 0.25)
            assert (sdt.r, sdt.alpha, sdt.lora_targets) == (8, 8, ["ssm.out"])
        else:
            assert config.method.alpha == config.method.r


@pytest.mark.parametrize("data", ["glue-rte", "samsum"])
def test_lora_has_a_like_budget(data: str) -> None:
    from peftcli.methods import registry
    from peftcli.models import loading

    config = compose(f"mamba/{data}_lora").config
    loaded = loading.load(config.model, "fp32", "causal-lm", None, meta=True)
    model = registry.find("lora")(config.method).attach(loaded.model, loaded.family)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == TRAINED[config.model.name.removeprefix("state-spaces/").removesuffix("-hf")]


@pytest.mark.parametrize("name", ["glue-mnli_lora", "dart_lora", "glue-rte_sdt", "spider_sdt"])
def test_a_recipe_is_rehearsed_with_random_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.training.run import run

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    config = compose(f"mamba/{name}").config
    labels = list(getattr(config.task, "labels", {})) or [""]
    files = []
    for split, count in {"train": 18, "validation": 6, "test": 6}.items():
        lines = [json.dumps({**ROWS, "label": labels[i % len(labels)]}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        files.append(f"data.files.{split}={tmp_path / split}.jsonl")
    columns = ",".join(f"{name}: {column}" for name, column in config.data.columns.items())
    more = [] if config.task.type == "classification" else ["task.generated_rows=2", "task.max_new_tokens=3"]
    more += ["method.warmup=1"] if name.endswith("sdt") else []
    overrides = [*TINY, *more, "data=files", *files, f"data.columns={{{columns}}}", f"output={tmp_path}"]
    composed = compose(f"mamba/{name}", overrides)
    folder = RunFolder.create(composed.config, composed.overrides)
    report = run(folder.path, quiet=True)
    assert report["run"]["status"] == "done"
    assert any("byte by byte" in note for note in report["data"]["notes"])
