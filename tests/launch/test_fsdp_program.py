"""FSDP through the program: stopped and gone on with on one process; LLaMA-2-7B counted, a tiny one trained."""

from __future__ import annotations

import json
import signal
import socket

import pytest

from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.config import frozen
from peftcli.training import checkpoints
from tests.commands import assert_said, wait_until

LLAMA = ["llama2-7b/gsm8k_kpsvd", "method.base=delta", "launch=fsdp", "launch.offload=true"]
TINY = [
    "model.weights=random", "launch.device=cpu", "training.precision=fp32", "training.max_steps=3", "method.rank=2",
    "method.budget=null", *(f"model.shape.{name}={value}" for name, value in {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 1000,
    }.items()),
]  # fmt: skip


@pytest.mark.slow
def test_fsdp_through_the_program_and_on_with_another_number(start, recipe, peft, tmp_path) -> None:
    """The usual port is taken all the while."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        given = ["launch.strategy=fsdp", "--processes=2", "training.max_steps=60", "training.save_every=2"]
        command = start("train", recipe, *given)

        def saved() -> bool:
            found = run_folders(tmp_path / "runs")
            return bool(found) and bool(checkpoints.complete(RunFolder.open(found[0]).checkpoints))

        wait_until(saved, lambda: command.output)
        command.send(signal.SIGTERM)  # to the parent alone
        assert_said(command, 0, "cut up in 3 parts", "in each of 2 processes", "stopped; continue with")
    run = RunFolder.open(run_folders(tmp_path / "runs")[0])
    assert run.status == "stopped"
    resumed = checkpoints.latest(run.checkpoints)
    assert resumed is not None
    assert 0 < resumed.progress.step < 60
    assert_said(peft("train", "--resume", run.path, "--processes=1"), 0, "report:")
    assert run.status == "done"
    assert run.metrics()[-1]["step"] == 60
    assert frozen.load(run.config).launch.strategy == "ddp"


@pytest.mark.slow
def test_a_tiny_llama_of_the_recipe_trains_on_two_processes(start, tmp_path) -> None:
    command = start("train", *LLAMA, *TINY, f"output={tmp_path / 'runs'}")
    assert_said(command, 0, "cut up in 4 parts", "in each of 2 processes", "report:")
    [folder] = run_folders(tmp_path / "runs")
    run = RunFolder.open(folder)
    assert run.metrics()[-1]["step"] == 3
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert frozen.load(run.config).launch.offload


@pytest.mark.slow
def test_llama_7b_is_counted_for_each_gpu(peft) -> None:
    def counted(*given: str) -> dict:
        result = peft("estimate", *LLAMA, "launch.device=cuda", "--json", *given)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    whole = counted("launch=ddp", "launch.offload=false", "launch.processes=8")
    parts = counted("launch.offload=false", "launch.processes=8")
    away = counted("launch.processes=8")
    assert whole["devices"] == parts["devices"] == 8
    sizes = [found["memory"]["heaviest"]["weights"] for found in (whole, parts, away)]
    assert sizes[0] == pytest.approx(8 * sizes[1], rel=1e-6)
    assert sizes[2] == 0
    assert whole["peak"] > parts["peak"] > away["peak"]
    assert parts["loading"] == sizes[0]
