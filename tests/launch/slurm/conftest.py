"""A real cluster of two nodes on this machine, and a false sbatch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from peftcli.artifacts.run_folder import RunFolder
from tests import commands

ROOT = Path(__file__).resolve().parents[3]
wait_until = partial(commands.wait_until, patience=300)  # a job starts Python up to four times
STEPS = 200
ON_CPU = ["launch=slurm", "launch.device=cpu", "launch.threads=1"]


def write_recipe(checkpoint: Path, rows: dict[str, str], folder: Path) -> Path:
    """A recipe over the tiny checkpoint that takes some seconds; its runs go to `folder / "runs"`."""
    file = folder / "trial.yaml"
    groups = {
        "schema_version": 1,
        "name": "trial",
        "output": str(folder / "runs"),
        "model": {"name": str(checkpoint), "source": "folder"},
        "data": {"source": "files", "files": dict(rows)},
        "method": {"name": "lora", "r": 2, "dropout": 0.1},
        "task": {"type": "classification", "prompt": "{text} Sentiment:"},
        "optim": {"lr": 0.02},
        "training": {
            "max_steps": STEPS, "batch_size": 6, "eval_every": "end", "save_every": 5, "precision": "fp32",
            "baselines": False,
        },
    }  # fmt: skip
    file.write_text(yaml.safe_dump(groups))
    return file


@pytest.fixture
def recipe(checkpoint, rows, tmp_path) -> Path:
    """That recipe in the test's own folder."""
    return write_recipe(checkpoint, rows, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(checkpoint, rows, tmp_path_factory) -> Path:
    """The finished run of the recipe in two processes on this machine, without a cluster."""
    file = write_recipe(checkpoint, rows, tmp_path_factory.mktemp("undisturbed"))
    code = "from peftcli.cli.main import main; main()"
    given = ["--processes=2", "launch.device=cpu", "launch.threads=1", "--quiet"]
    environ = os.environ | {"PEFTCLI_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    command = [sys.executable, "-c", code, "train", str(file), *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return file.parent / "runs" / "latest"


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Callable[..., Path]:
    """`fake("sbatch", "echo 7")` puts a program of that name before all others; it notes how it was called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        program, calls = programs / name, programs / f"{name}.calls"
        program.write_text(f'#!/bin/bash\necho "$@" >> {calls}\n{body}\n')
        program.chmod(0o755)
        return calls

    return make


@pytest.fixture(scope="session")
def controller():
    """The folder of a cluster that is up; skips where Slurm is not installed."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import slurm_cluster

    if missing := slurm_cluster.programs():
        pytest.skip(f"{', '.join(missing)} not installed (apt-get install slurm-wlm munge)")
    top = Path(tempfile.mkdtemp(prefix="slurm"))  # the path of a socket has to be short
    before = os.environ.get("SLURM_CONF")
    try:
        slurm_cluster.up(top / "cluster")
        yield top / "cluster"
    finally:
        slurm_cluster.down(top / "cluster")
        top.rmdir()
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


class Cluster:
    """What a person would type at a cluster."""

    def __init__(self, peft: Callable, recipe: Path):
        self._peft, self._recipe = peft, recipe

    def submit(self, *given: object) -> tuple[str, Path]:
        """`peft train` on the cluster; returns the job's number and the folder."""
        done = self._peft("train", self._recipe, *ON_CPU, "--json", *given)
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        return told["job"], Path(told["folder"])

    def again(self, folder: Path) -> str:
        """`peft train --resume`; returns the job's number."""
        done = self._peft("train", "--resume", folder, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["job"]

    def standing(self, folder: Path) -> dict[str, dict]:
        """`peft jobs` by job."""
        done = self._peft("jobs", "--runs", folder, "--json")
        assert done.exit_code == 0, done.output
        return {row["job"]: row for row in json.loads(done.stdout)}

    @staticmethod
    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def state(self, job: str) -> str:
        """As Slurm says it, also of a job that ended a moment ago."""
        return self.detail(job, "JobState")

    def detail(self, job: str, name: str) -> str:
        pairs = [word.partition("=") for word in self.ask("scontrol", "show", "job", job).split()]
        return {key: value for key, _, value in pairs}[name]

    def wait(self, job: str, *states: str) -> None:
        log = self.detail(job, "StdOut")
        wait_until(lambda: self.state(job) in states, lambda: f"{self.state(job)}: {said(Path(log))}")

    @staticmethod
    def wait_for_steps(folder: Path, count: int = 7) -> None:
        file = folder / "metrics.jsonl"
        log = lambda: "\n".join(said(path) for path in folder.glob("slurm-*.log"))  # noqa: E731
        wait_until(lambda: file.is_file() and file.read_bytes().count(b"\n") >= count, log)


def said(log: Path) -> str:
    return log.read_text() if log.is_file() else ""


@pytest.fixture
def cluster(controller, peft, recipe):
    """A cluster without jobs."""
    yield Cluster(peft, recipe)
    subprocess.run(["scancel", "--me", "--signal=KILL", "--full"], check=False)
    subprocess.run(["scancel", "--me"], check=False)
    wait_until(lambda: not Cluster.ask("squeue", "--noheader"), lambda: Cluster.ask("squeue"))


def weights(folder: Path) -> bytes:
    return (RunFolder(folder).adapter / "adapter_model.safetensors").read_bytes()
