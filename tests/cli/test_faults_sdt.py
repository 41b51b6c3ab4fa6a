"""What SDT cannot do is said in plain words, before it costs a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import write_recipe
from tests.commands import assert_said


@pytest.fixture
def train(peft, mamba_folder, rows, tmp_path) -> Callable:
    """`train(channels=9)` trains the tiny Mamba by SDT with these settings, for four steps of six rows."""

    def run(*overrides: str, base: Path = mamba_folder, **method: Any):
        return peft("train", write_recipe(base, rows, tmp_path, method={"name": "sdt", **method}), *overrides)

    return run


def test_a_base_without_state_spaces(train, checkpoint, tmp_path):
    result = train(base=checkpoint)
    assert_said(result, 2, "LlamaForCausalLM has no Mamba block", "model=mamba-wordnet", "method=lora")
    assert not any((tmp_path / "runs").rglob("*"))


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"channels": 1.5}, "channels"), ({"channels": 0.0}, "channels"), ({"states": -0.1}, "states"),
     ({"pruned": 1.01}, "pruned"), ({"warmup": 0}, "warmup")],
)  # fmt: skip
def test_shares_that_are_none(train, tmp_path, settings, key):
    assert_said(train(**settings), 2, f"method.{key} is", "expected a count", "up to 1.0 for all")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"channels": 65}, "method.channels is 65, but there are only 64"),
        ({"states": 5}, "method.states is 5, but there are only 4"),
        ({"pruned": 65}, "method.pruned is 65, but there are only 64"),
        ({"channels": 60, "pruned": 5}, "method.pruned means 5 channels, but 60 of a layer's 64 are trained"),
        ({"channels": 65, "selector": "random"}, "method.channels is 65, but there are only 64"),
        ({"channels": 60, "pruned": 5, "selector": "magnitude", "warmup": 1}, "method.pruned means 5 channels"),
    ],
)
def test_more_channels_or_states_than_there_are(train, settings, what):
    assert_said(train(**settings), 2, what)


@pytest.mark.parametrize("selector", ["magnitude", "abar"])
def test_a_warm_up_that_the_rows_do_not_reach_for(train, selector):
    result = train("training.max_steps=30", selector=selector, warmup=8)
    assert_said(result, 2, "the warm-up takes 8 steps, but the training rows make only 7 batches")
    assert_said(result, 2, "method.warmup", "method.selector=taylor")


@pytest.mark.parametrize(
    ("warmup", "what"),
    [
        (4, "method.warmup=4 takes 4 of the run's 4 steps"),
        (0.9, "method.warmup=0.9 takes 4 of the run's 4 steps"),
        (5, "method.warmup=5 takes 5 of the run's 4 steps"),
        (8, "method.warmup=8 takes 8 of the run's 4 steps"),
        (1.0, "method.warmup takes all steps, and leaves none to train what it selects"),
    ],
)
def test_a_warm_up_that_leaves_no_step(train, warmup, what):
    assert_said(train(selector="magnitude", warmup=warmup), 2, what)


def test_a_checkpoint_whose_states_were_rounded(train, mamba_folder, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(mamba_folder, tmp_path / "rounded")
    tensors = load_file(folder / "model.safetensors")
    half = {name: t.bfloat16() if name.endswith("A_log") else t for name, t in tensors.items()}
    assert any(tensor.dtype == torch.bfloat16 for tensor in half.values())
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    result = train(base=folder)
    assert_said(result, 2, "needs A_log in float32", "rounded to bfloat16", "a checkpoint that was saved in float32")


def test_an_adapter_whose_indices_were_tampered_with(train, peft, made):
    from safetensors.torch import load_file, save_file

    assert train().exit_code == 0
    path = made().adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "sdt_channels" in name)[0] = 64
    save_file(tensors, path)
    assert_said(peft("predict", made().path, "--text", "a film"), 1, "adapter-keys", "has indices outside 0 to 63")
