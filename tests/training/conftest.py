"""A tiny checkpoint and labelled rows on disk, and runs over them in processes that may be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.schema import (
    ClassificationConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
)
from peftcli.methods.lora.settings import Settings as Lora

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "music", "plot", "cast", "the", "a", "was", "and"]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    [
        "peftcli.training.run",
        "peftcli.methods.lora.tuner",
        "peftcli.methods.full.tuner",
        "peftcli.reports.page",
        "peftcli.reports.figures",
        "matplotlib.backends.backend_svg",
        "torchmetrics.functional.classification",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.tokenization_auto",
    ]
)


def _sentence(draw: random.Random, label: str) -> str:
    pool = WORDS[:3] if label == "good" else WORDS[3:6]
    return " ".join(draw.choice(pool if draw.random() < 0.4 else WORDS[6:]) for _ in range(draw.randint(3, 14)))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A LLaMA of two layers with its tokenizer, as a folder."""
    from tests.tiny import build_llama, make_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    words = make_tokenizer()
    words.save_pretrained(folder)
    build_llama(len(words)).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, str]:
    folder, draw = tmp_path_factory.mktemp("rows"), random.Random(0)
    files = {}
    for split, count in {"train": 40, "validation": 12, "test": 16}.items():
        path = folder / f"{split}.jsonl"
        labels = [("good", "bad")[i % 2] for i in range(count)]
        path.write_text("".join(json.dumps({"text": _sentence(draw, y), "label": y}) + "\n" for y in labels))
        files[split] = str(path)
    return files


@pytest.fixture
def make_run(checkpoint, rows, tmp_path) -> Callable[..., RunFolder]:
    """`make_run(training={...}, optim={...}, method=..., launch={...}, task={...})` makes a run folder."""

    def make(method=None, task=None, data=None, seed=0, **groups) -> RunFolder:
        config = RunConfig(
            model=ModelConfig(name=str(checkpoint), source="folder"),
            data=replace(DataConfig(source="files", files=rows), **(data or {})),
            method=method or Lora(r=2, dropout=0.1),
            task=replace(ClassificationConfig(prompt="{text} Sentiment:"), **(task or {})),
            optim=replace(OptimConfig(lr=0.02), **groups.get("optim", {})),
            training=replace(
                TrainingConfig(max_steps=8, batch_size=6, eval_every=3, precision="fp32", baselines=False),
                **groups.get("training", {}),
            ),
            launch=replace(LaunchConfig(device="cpu", threads=1), **groups.get("launch", {})),
            name="trial",
            seed=seed,
            output=str(tmp_path / "runs"),
        )
        return RunFolder.create(config)

    return make


def _train(folder: Path, cache: str, event: str, at: int, number: int) -> None:
    """In a process of its own: train, and send this process a signal at an event."""
    os.environ["PEFTCLI_CACHE"] = cache
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    from peftcli.training.run import run

    seen = 0

    def count(*_) -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)

    if event:
        _hook(event, count)
    run(folder, quiet=True)


def _hook(event: str, count: Callable[..., None]) -> None:
    from peftcli.artifacts import atomic
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.training import checkpoints
    from peftcli.training.loop import _StageLoop

    def before(owner, name: str) -> None:
        former = getattr(owner, name)

        def hooked(*args, **kwargs):
            count()
            return former(*args, **kwargs)

        setattr(owner, name, hooked)

    {
        "log": lambda: before(RunFolder, "log"),
        "tensors": lambda: before(atomic, "write_tensors"),
        "prune": lambda: before(checkpoints, "prune"),
        "stage": lambda: before(_StageLoop, "run"),
    }[event]()


@pytest.fixture
def train(monkeypatch, tmp_path_factory):
    """`train(run)` trains to the end; `train(run, "log", 5)` kills the process before the fifth log row."""
    cache = tmp_path_factory.getbasetemp() / "cache"

    def start(run: RunFolder, event: str = "", at: int = 0, number: int = signal.SIGKILL) -> int:
        process = server.Process(target=_train, args=(run.path, str(cache), event, at, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return start
