"""`peft compress`: from a finished run over generated pictures to a smaller model that stands by itself."""

from __future__ import annotations

import json

import onnxruntime
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import peftcli
from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.methods.lora.settings import Settings as Lora
from tests import pictures
from tests.commands import assert_said


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> RunFolder:
    """A finished run of a ViT."""
    from peftcli.training.run import run

    folder = tmp_path_factory.mktemp("original")
    files = {
        "train": pictures.make_folder(folder / "train", {"good": 24, "bad": 24}),
        "test": pictures.make_folder(folder / "test", {"good": 8, "bad": 8}, first=500),
    }
    made = pictures.make_run(
        pictures.make_checkpoint(folder / "vit"), files, folder / "runs", method=Lora(r=4, targets=["all"]),
        task={"positive": "bad"}, training={"max_steps": 30},
    )  # fmt: skip
    run(made.path, quiet=True)
    return made


def test_a_finished_run_becomes_smaller(peft, original, tmp_path):
    result = peft(
        "compress", original.path, "target.parameters=60%", "training.max_steps=6", f"output={tmp_path}", "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert "the backbone has" in result.output
    [path] = run_folders(tmp_path)
    report = RunFolder.open(path).read_report()
    names = [row["name"] for row in report["quality"]["rows"]]
    assert names == ["untouched base", "majority class", "before training", "tuned"]


def test_the_smaller_model_stands_by_itself(peft, original, tmp_path):
    result = peft("compress", original.path, "target.flops=70%", "training.max_steps=0", f"output={tmp_path}", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    folder = RunFolder.open(report["folder"])
    peftcli.register_with_transformers()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    model = AutoModelForImageClassification.from_pretrained(folder.model).eval()
    assert model.config.model_type == "compact_vit"
    assert AutoImageProcessor.from_pretrained(folder.model).size["height"] == 16
    told = peft("merge", folder.path, "--to", tmp_path / "graph", "--onnx", "--pt2", "--json")
    assert told.exit_code == 0, told.output
    files = json.loads(told.stdout)["files"]
    assert all(files[name]["drift"]["share"] < 1e-4 for name in ("model.onnx", "model.pt2"))
    program = torch.export.load(tmp_path / "graph" / "model.pt2").module()
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(program(batch["pixel_values"]), expected, atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    [scores] = session.run(None, {"pixel_values": batch["pixel_values"].numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), expected, atol=1e-4, rtol=1e-4)
    assert (original.path / "merged" / "config.json").is_file()  # made once
    made = (original.path / "merged" / "config.json").stat().st_mtime
    assert peft("compress", original.path, "target.parameters=1%", f"output={tmp_path}").exit_code == 2
    assert (original.path / "merged" / "config.json").stat().st_mtime == made


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "method.mode=compress has one target"),
        (["target.parameters=150%"], "above 0 and below 100%"),
        (["target.parameters=50"], "above 0 and below 100%"),
        (["target.size=50%"], "unknown target 'size'"),
        (["target.parameters=50%", "target.flops=50%"], "has one target"),
        (["target.parameters=1%"], "1% of the backbone is less than can be had"),
        (["target.parameters=50%", "method.basis=gradient"], "method.mode=compress has none"),
        (["target.parameters=50%", "method.prune=1"], "method.prune is 1"),
        (["target.parameters=50%", "method.calibration_batches=1", "training.batch_size=1"], "may get up to 19"),
    ],
)
def test_mistakes_are_plain(peft, original, tmp_path, overrides, said):
    assert_said(peft("compress", original.path, *overrides, f"output={tmp_path}"), 2, said)
    assert not run_folders(tmp_path)


def test_neither_a_run_nor_a_recipe(peft, tmp_path):
    assert_said(peft("compress", "no/such", "target.parameters=50%"), 2, "unknown recipe 'no/such'")
    assert_said(peft("compress", tmp_path, "target.parameters=50%"), 2, "is not a run folder")
