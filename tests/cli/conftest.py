"""Finished runs of several kinds, trained once for all tests that ask for them."""

from __future__ import annotations

from functools import cache

import pytest
from typer.testing import CliRunner

from peftcli.artifacts.run_folder import RunFolder


@pytest.fixture(scope="session")
def trained(checkpoint, rows, tmp_path_factory):
    """`trained("words")` is the folder of a finished run; tests only read it."""
    from peftcli.config.schema import GenerationConfig
    from peftcli.methods.full.settings import Settings as Full
    from peftcli.methods.linear_probe.settings import Settings as Probe
    from peftcli.methods.lora.settings import Settings as Lora
    from peftcli.methods.peft.settings import Settings as Peft
    from peftcli.training.run import run
    from tests.runs import make_run

    generation = GenerationConfig(prompt="{text} Sentiment:", completion="{label}", max_new_tokens=4, generated_rows=5)
    kinds = {
        "words": {"training": {"baselines": True}},
        "words in bf16": {"training": {"precision": "bf16"}},
        "linear": {"task": {"head": "linear"}},
        "linear in bf16": {"task": {"head": "linear"}, "training": {"precision": "bf16"}},
        "probe": {"method": Probe(), "task": {"head": "linear"}},
        "pissa": {"method": Lora(r=2, init="pissa")},
        "full": {"method": Full(), "optim": {"lr": 1e-3}},
        "prompt": {"method": Peft(type="PROMPT_TUNING", args={"num_virtual_tokens": 3})},
        "generation": {"task": generation, "training": {"baselines": True}},
    }

    @cache
    def train(kind: str) -> RunFolder:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # another precision in the same process
        settings = kinds[kind] | {"training": {"max_steps": 4, "eval_every": 2} | kinds[kind].get("training", {})}
        folder = make_run(checkpoint, rows, tmp_path_factory.mktemp("runs"), **settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
            run(folder.path, quiet=True)
        return folder

    return train


@pytest.fixture
def peft(monkeypatch, tmp_path_factory):
    """Run the program in this process: `peft("eval", folder, "--json")`."""
    from peftcli.cli.main import app

    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])
