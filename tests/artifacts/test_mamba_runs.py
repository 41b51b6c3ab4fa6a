"""Runs on a tiny Mamba in bfloat16: trained, loaded again, merged, with state parameters in float32 throughout."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from peftcli.artifacts.export import export
from peftcli.artifacts.tuned import open_tuned
from peftcli.methods.full.settings import Settings as Full
from peftcli.methods.linear_probe.settings import Settings as LinearProbe
from peftcli.methods.lora.settings import Settings as Lora
from tests.runs import make_run

HALF = {"max_steps": 3, "precision": "bf16"}
LINEAR = {"head": "linear"}


@pytest.mark.parametrize(
    "method",
    [LinearProbe(), Full(), Full(head_first=0.4), Lora(r=3, targets=["ssm.out", "ssm.x"])],
    ids=["probe", "full", "head-first", "lora"],
)
def test_a_linear_head_is_trained_and_found_again(mamba_folder, rows, tmp_path, method) -> None:
    from peftcli.training.run import run

    folder = make_run(mamba_folder, rows, tmp_path, method=method, task=LINEAR, training=HALF)
    assert run(folder.path, quiet=True)["run"]["status"] == "done"
    tuned = open_tuned(folder.path)
    sentences = [{"text": "a great film"}, {"text": "the plot was awful and the music poor"}]
    together, alone = (
        tuned.task.predict(tuned.model, sentences, tuned.tokenizer, batch_size=size, device="cpu") for size in (2, 1)
    )
    for one, other in zip(together, alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=0.02)


def test_a_half_precision_merge_keeps_the_states_exact(mamba_folder, rows, tmp_path) -> None:
    from peftcli.training.run import run

    method, more = Lora(r=4, targets=["all"]), {"training": HALF | {"max_steps": 8}, "model": {"dtype": "bfloat16"}}
    folder = make_run(mamba_folder, rows, tmp_path / "runs", method=method, **more)
    run(folder.path, quiet=True)
    found = export(folder.path, tmp_path / "merged")
    assert found["dtype"] == "bfloat16"
    merged, before = load_file(tmp_path / "merged/model.safetensors"), load_file(mamba_folder / "model.safetensors")
    for name, tensor in merged.items():
        exact = name.endswith(("A_log", "mixer.D"))
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert not exact or torch.equal(tensor, before[name])
