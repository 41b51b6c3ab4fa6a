"""Whole runs over a base in few bits: trained, killed and resumed, measured again, asked, merged, counted."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peftcli.artifacts import adapter
from peftcli.artifacts.run_folder import RunFolder
from peftcli.cli.main import app
from peftcli.config import frozen
from peftcli.config.errors import CheckFailed
from peftcli.methods.kpsvd.settings import Settings as Kpsvd
from peftcli.methods.lora.settings import Settings as Lora
from peftcli.models import loading
from peftcli.training import checkpoints
from tests.runs import make_run
from tests.training.test_resume import assert_same

pytest.importorskip("bitsandbytes")

RUNS = {
    "nf4": {"method": Kpsvd(rank="auto", max_rank=4), "training": {"precision": "bf16"}},
    "int8": {"method": Lora(r=2)},
}
DRIFT = {"nf4": 0.05, "int8": 1e-4}
"""Most that merging may move the outputs, as a share of their spread: bf16 rounds the merged weights."""


@pytest.fixture(scope="module", params=list(RUNS))
def whole(request, wide_checkpoint: Path, rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run."""
    from accelerate.state import AcceleratorState

    from peftcli.training.run import run

    AcceleratorState._reset_state(reset_partial_state=True)  # another precision in the same process
    settings = RUNS[request.param]
    training = {"baselines": True, "save_every": 1, "max_steps": 6} | settings.get("training", {})
    packing = {"quantization": request.param}
    groups = {**settings, "training": training, "model": packing}
    folder = make_run(wide_checkpoint, rows, tmp_path_factory.mktemp("whole"), **groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        run(folder.path, quiet=True)
    return folder


def peft(*arguments) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(whole: RunFolder, train, tmp_path: Path) -> None:
    run = RunFolder.create(replace(frozen.load(whole.config), output=str(tmp_path)))
    assert train(run, "log", 5) == -signal.SIGKILL
    assert checkpoints.latest(run.checkpoints).progress.step > 0
    assert train(run) == 0
    assert_same(run, whole)


def test_the_report_counts_what_the_bits_stand_for(whole: RunFolder, wide_checkpoint: Path) -> None:
    report = whole.read_report()
    base = AutoModelForCausalLM.from_pretrained(wide_checkpoint)
    expected = sum(p.numel() for p in base.parameters()) + report["parameters"]["trainable"]
    assert report["parameters"]["total"] == expected
    notes = " ".join(report["data"]["notes"])
    assert ("method.base=residual is delta in" in notes) == (frozen.load(whole.config).method.name == "kpsvd")


def test_eval_and_predict_give_the_numbers_of_the_run(whole: RunFolder, rows: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(peft("eval", whole.path, "--json"))
    assert set(found["difference"].values()) == {0.0}
    assert found["quality"]["rows"][0]["name"] == "untouched base"
    peft("predict", whole.path, "--input", rows["test"], "--output", tmp_path / "answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 16


def test_merging_makes_the_base_whole_and_tells_the_drift(whole: RunFolder, tmp_path: Path) -> None:
    kind = frozen.load(whole.config).model.quantization
    to = tmp_path / "merged"
    found = json.loads(peft("merge", whole.path, "training.merge_tolerance=0.05", "--to", to, "--json"))
    assert found["quantization"] == kind
    assert 0 < found["merge"]["mean"] < found["merge"]["effect"]
    assert found["merge"]["share"] < DRIFT[kind]
    assert found["reload"] == found["merge"]
    written = json.loads((to / "config.json").read_text())
    assert "quantization_config" not in written
    model = AutoModelForCausalLM.from_pretrained(to)
    assert model.dtype == (torch.bfloat16 if kind == "nf4" else torch.float32)


def test_the_adapter_knows_its_base(whole: RunFolder, wide_checkpoint: Path) -> None:
    config = frozen.load(whole.config)
    kind = config.model.quantization
    lineage = adapter.read_lineage(whole.adapter)
    assert lineage["base"]["quantization"] == kind
    assert any(name.endswith(("weight.absmax", "SCB")) for name in lineage["base"]["tensors"])
    card = (whole.adapter / "README.md").read_text()
    assert f"{kind} (bitsandbytes)" in card
    code = card.split("```python")[1].split("peftcli.register")[0]
    names: dict = {}
    exec(code, names)
    bits = names["bits"]
    assert bits.load_in_4bit == (kind == "nf4")
    plain = AutoModelForCausalLM.from_pretrained(wide_checkpoint)
    with pytest.raises(CheckFailed, match=f"matrices were {kind} and are not packed here"):
        adapter.load(plain, whole.adapter)


def test_a_change_fits_the_whole_base_too(whole: RunFolder, wide_checkpoint: Path) -> None:
    config, ids = frozen.load(whole.config), torch.arange(3, 15)[None]
    adapter.read_config(whole.adapter)
    plain = AutoModelForCausalLM.from_pretrained(wide_checkpoint)
    packed = loading.load(config.model, "fp32", "causal-lm", None).model
    changes = []
    for base in (plain, packed):
        model = PeftModel.from_pretrained(base, str(whole.adapter)).eval()
        with torch.no_grad(), model.disable_adapter():
            before = model(input_ids=ids).logits
        changes.append(model(input_ids=ids).logits - before)
    alike = torch.nn.functional.cosine_similarity(changes[0].flatten(), changes[1].flatten(), dim=0)
    assert alike > {"nf4": 0.5, "int8": 0.9}[config.model.quantization]


def test_counting_needs_neither_weights_nor_the_package(monkeypatch, wide_checkpoint: Path, rows, tmp_path) -> None:
    from peftcli.training.estimate import estimate

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    held = {}
    for kind in (None, "nf4", "int8"):
        run = make_run(
            wide_checkpoint, rows, tmp_path, method=Kpsvd(rank="auto", source="gradient"), model={"quantization": kind}
        )
        found = estimate(frozen.load(run.config))
        held[kind] = found.weights_by_dtype
        assert found.parameters["total"] == found.parameters["trainable"] + sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(wide_checkpoint).parameters()
        )
        assert any("max_rank=32 terms" in note for note in found.notes)
        assert any("4 modules: their gradients" in note for note in found.notes)
    in_bits = (held[None]["float32"] - held["nf4"]["float32"]) // 4
    assert held["nf4"]["uint8"] == pytest.approx(0.516 * in_bits, rel=0.01)
    assert held["int8"]["int8"] == in_bits
