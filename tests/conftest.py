"""A tiny checkpoint and labelled rows on disk, runs over them, and disks that are full or cannot be written to."""

from __future__ import annotations

import gc
import json
import random
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "music", "plot", "cast", "the", "a", "was", "and"]


def _sentence(draw: random.Random, label: str) -> str:
    pool = WORDS[:3] if label == "good" else WORDS[3:6]
    return " ".join(draw.choice(pool if draw.random() < 0.4 else WORDS[6:]) for _ in range(draw.randint(3, 14)))


def pytest_collection_finish() -> None:
    """What the tests have imported stays: a run collects garbage twice, and would look through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path_factory):
    """The tests' own cache, but for those that are marked to need fetched samples."""
    if "samples" not in request.keywords:
        monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


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
def wide_checkpoint(tmp_path_factory) -> Path:
    """The same with matrices that can be packed in few bits on a CPU."""
    from tests.tiny import build_llama, make_tokenizer

    folder = tmp_path_factory.mktemp("wide")
    words = make_tokenizer()
    words.save_pretrained(folder)
    build_llama(len(words), hidden_size=64, intermediate_size=128).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mamba_folder(tmp_path_factory) -> Path:
    """Two layers of Mamba as Transformers writes them, with a tokenizer; A_log has no value that bfloat16 can hold."""
    import torch
    from transformers import MambaForCausalLM

    from peftcli.testing.tiny import mamba_shape
    from tests.tiny import make_tokenizer

    folder, words = tmp_path_factory.mktemp("mamba"), make_tokenizer()
    words.save_pretrained(folder)
    torch.manual_seed(0)
    model = MambaForCausalLM(mamba_shape(vocab_size=len(words), residual_in_fp32=True))
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.mixer.A_log.add_(0.001)
    model.save_pretrained(folder)
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
def make_run(checkpoint, rows, tmp_path) -> Callable:
    """`make_run(training={...}, optim={...}, method=..., launch={...}, task={...})` makes a run folder."""
    from tests.runs import make_run

    return partial(make_run, checkpoint, rows, tmp_path / "runs")


@pytest.fixture
def make_mamba_run(mamba_folder, rows, tmp_path) -> Callable:
    """The same over the tiny Mamba."""
    from tests.runs import make_run

    return partial(make_run, mamba_folder, rows, tmp_path / "runs")


@pytest.fixture
def mounted(tmp_path: Path):
    """Mount a small memory disk with options; skips where that needs rights that the test does not have."""
    places: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a memory disk here")
        places.append(place)
        return place

    try:
        yield mount
    finally:
        for place in places:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
