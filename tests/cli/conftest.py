"""The program in this process or in one of its own, and finished runs of several kinds, trained once for all tests."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import yaml
from typer.testing import CliRunner

from peftcli.artifacts.run_folder import RunFolder, run_folders
from tests.commands import Command


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
        "shots and beams": {"task": replace(generation, shots=2, beams=2)},
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


def write_recipe(checkpoint, rows, folder, **changes):
    """A recipe of four steps over the tiny checkpoint, with other groups by name; its runs go to `folder / "runs"`."""
    file = folder / "trial.yaml"
    groups = {
        "schema_version": 1,
        "name": "trial",
        "output": str(folder / "runs"),
        "model": {"name": str(checkpoint), "source": "folder"},
        "data": {"source": "files", "files": dict(rows)},
        "method": {"name": "lora", "r": 2},
        "task": {"type": "classification", "prompt": "{text} Sentiment:"},
        "optim": {"lr": 0.02},
        "training": {"max_steps": 4, "batch_size": 6, "eval_every": 2, "precision": "fp32", "baselines": False},
        "launch": {"device": "cpu", "threads": 1},
    }
    file.write_text(yaml.safe_dump(groups | changes))
    return file


@pytest.fixture
def recipe(checkpoint, rows, tmp_path):
    """A small recipe as a file; its runs go to `tmp_path / "runs"`."""
    return write_recipe(checkpoint, rows, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(checkpoint, rows, tmp_path_factory) -> RunFolder:
    """The finished run of that recipe that nothing happened to."""
    from peftcli.cli.main import app

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert CliRunner().invoke(app, ["train", str(write_recipe(checkpoint, rows, folder))]).exit_code == 0
    return RunFolder.open(run_folders(folder / "runs")[0])


@pytest.fixture
def made(tmp_path):
    """`made()` is the only run folder that a test has made."""

    def only() -> RunFolder:
        [path] = run_folders(tmp_path / "runs")
        return RunFolder.open(path)

    return only


@pytest.fixture
def start(monkeypatch, tmp_path, tmp_path_factory):
    """`start("train", recipe)` runs the program in a process of its own, which ends with the test."""
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    begun: list[Command] = []

    def command(*arguments, largest: int | None = None) -> Command:
        begun.append(Command(arguments, tmp_path / f"output{len(begun)}.txt", largest))
        return begun[-1]

    yield command
    for one in begun:
        one.kill()
