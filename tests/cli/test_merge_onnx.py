"""`peft merge --onnx`: the folder's own lines of Python answer like the run, without this package."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.cli.main import app
from peftcli.testing import tiny
from tests.commands import run_readme


def answer(peft, run, text: str) -> dict:
    return json.loads(peft("predict", run, "--text", text, "--json").stdout)


@pytest.mark.slow
def test_a_text_classifier_answers_as_the_run_does(peft, trained, tmp_path):
    run, to = trained("linear"), tmp_path / "onnx"
    result = peft("merge", run.path, "--to", to, "--onnx", "--int8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    files = found["files"]
    assert list(files) == ["PyTorch", "model.onnx", "model.int8.onnx"]
    assert files["model.onnx"]["drift"]["share"] < 1e-4
    assert 0 < files["model.int8.onnx"]["drift"]["share"] < 1
    assert files["model.onnx"]["metrics"] == pytest.approx(files["PyTorch"]["metrics"], abs=1e-4)
    assert (found["rows"], found["measured_rows"], found["metric"]) == (16, 16, "accuracy")
    assert found["merge"]["share"] < 1e-4
    assert {"model.onnx", "model.int8.onnx", "labels.json", "tokenizer.json", "lineage.json", "README.md"} <= {
        path.name for path in to.iterdir()
    }
    assert json.loads((to / "labels.json").read_text()) == ["bad", "good"]
    assert files["model.onnx"]["bytes"] == (to / "model.onnx").stat().st_size
    text = "the film was good"
    assert run_readme(to, text=text) == answer(peft, run.path, text)["predicted"]
    assert peft("merge", run.path, "--to", to, "--onnx").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["words", "generation", "full"])
def test_other_tasks_answer_as_the_run_does(peft, trained, tmp_path, kind):
    run, to = trained(kind), tmp_path / "onnx"
    result = peft("merge", run.path, "--to", to, "--onnx")
    assert result.exit_code == 0, result.output
    assert re.search(r"(?m)^model\.onnx +[\d.]+ ", result.output)
    for text in ("the film was good", "a bad plot"):
        assert run_readme(to, text=text) == answer(peft, run.path, text)["predicted"]


@pytest.mark.slow
def test_a_mamba_run_is_one_graph_for_every_length(peft, make_mamba_run, tmp_path):
    from peftcli.training.run import run

    folder = make_mamba_run(training={"max_steps": 4})
    run(folder.path, quiet=True)
    assert peft("merge", folder.path, "--to", tmp_path / "onnx", "--onnx").exit_code == 0
    for text in ("good", " ".join(["the film was good"] * 9)):
        assert run_readme(tmp_path / "onnx", text=text) == answer(peft, folder.path, text)["predicted"]
    refused = peft("merge", folder.path, "--to", tmp_path / "program", "--onnx", "--pt2")
    assert refused.exit_code == 2, refused.output
    assert "a model of type mamba cannot be exported" in refused.stderr
    assert not (tmp_path / "program").exists()


def test_what_has_no_graph_and_what_does_not_go_together_say_so(peft, trained, tmp_path):
    to = tmp_path / "onnx"
    result = peft("merge", trained("prompt").path, "--to", to, "--onnx")
    assert result.exit_code == 2
    assert "PROMPT_TUNING puts inputs of its own before the text" in " ".join(result.output.split())
    result = peft("merge", trained("words").path, "--to", to, "--int8")
    assert result.exit_code == 2
    assert "--int8 goes with --onnx" in result.output
    result = peft("merge", trained("words").path, "--to", to, "--onnx", "--dtype", "bf16")
    assert result.exit_code == 2
    assert "an ONNX file is float32" in result.output
    assert not to.exists()


def pictures(folder: Path) -> Path:
    """Bright and dark pictures of 30 x 40 pixels in folders by label."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label, low in (("good", 0), ("bad", 96)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                coarse = draw.integers(low, low + 160, (6, 6, 3), dtype=np.uint8)
                Image.fromarray(coarse).resize((30, 40)).save(folder / split / label / f"{i}.png")
    return folder


def vision_run(base, method: dict, folder: Path, reader: dict) -> RunFolder:
    """A finished run of six steps on a tiny checkpoint and generated pictures."""
    model = base(torch.float32).model
    model.save_pretrained(folder / "base")
    (folder / "base/preprocessor_config.json").write_text(json.dumps(reader))
    rows = pictures(folder / "pictures")
    recipe = {
        "schema_version": 1,
        "name": "trial",
        "output": str(folder / "runs"),
        "model": {"name": str(folder / "base"), "source": "folder"},
        "data": {"source": "files", "files": {name: str(rows / name) for name in ("train", "test")}},
        "method": method,
        "task": {"type": "images"},
        "optim": {"lr": 0.01},
        "training": {"max_steps": 6, "batch_size": 4, "precision": "fp32", "baselines": False},
        "launch": {"device": "cpu", "threads": 1},
    }
    (folder / "trial.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["train", str(folder / "trial.yaml")])
    assert result.exit_code == 0, result.output
    return RunFolder.open(run_folders(folder / "runs")[0])


SQUASH = {"image_processor_type": "ViTImageProcessor"}
SQUASH |= {"size": {"height": tiny.PIXELS, "width": tiny.PIXELS}, "image_mean": [0.5, 0.4, 0.3], "resample": 2}
CROP = {"image_processor_type": "BitImageProcessor"}
CROP |= {"size": {"shortest_edge": 20}, "crop_size": {"height": tiny.PIXELS, "width": tiny.PIXELS}, "resample": 3}
CROP["do_center_crop"] = True
SPARSE = {"name": "sparse_adapter", "r": 6, "sparsity": 0.5}


@pytest.mark.parametrize(
    ("base", "method", "reader", "merged"),
    [
        (tiny.vit, {"name": "lora", "r": 2}, SQUASH, True),
        pytest.param(tiny.dinov2, {"name": "lora", "r": 2}, CROP, True, marks=pytest.mark.slow),
        pytest.param(tiny.vit, {"name": "full"}, SQUASH, False, marks=pytest.mark.slow),
        pytest.param(tiny.resnet, {"name": "linear_probe"}, CROP, True, marks=pytest.mark.slow),
        pytest.param(tiny.resnet, SPARSE, CROP, False, marks=pytest.mark.slow),
        pytest.param(tiny.vit, SPARSE, CROP, False, marks=pytest.mark.slow),
        pytest.param(tiny.vit, SPARSE | {"activation": "linear"}, SQUASH, True, marks=pytest.mark.slow),
    ],
)
def test_a_model_of_pictures_gives_the_chances_that_the_run_gives(peft, tmp_path, base, method, reader, merged):
    run = vision_run(base, method, tmp_path, reader)
    to = tmp_path / "onnx"
    result = peft("merge", run.path, "--to", to, "--onnx", "--int8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["merge"] is not None) == merged
    assert found["files"]["model.onnx"]["drift"]["share"] < 1e-4
    assert found["files"]["model.int8.onnx"]["metrics"].keys() == found["files"]["PyTorch"]["metrics"].keys()
    folder = tmp_path / "pictures/test/bad"
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone held upright
    Image.open(folder / "0.png").save(folder / "1.jpg", exif=exif)
    predicted = json.loads(peft("predict", run.path, "--input", folder, "--json").stdout)["predictions"]
    assert [row["image"] for row in predicted[:2]] == ["0.png", "1.jpg"]
    for row in predicted[:2]:
        told = ast.literal_eval(run_readme(to, PICTURE=str(folder / Path(row["image"]).name)))
        assert told == pytest.approx(row["probabilities"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("base", [tiny.vit, tiny.resnet])
def test_the_graph_of_a_sparse_adapter_holds_what_pruning_left(peft, tmp_path, base):
    import onnx

    run = vision_run(base, {"name": "sparse_adapter", "r": 64, "sparsity": 0.9}, tmp_path, SQUASH)
    refused = peft("merge", run.path, "--to", tmp_path / "merged")
    assert refused.exit_code == 2
    assert "--onnx" in refused.output
    assert peft("merge", run.path, "--to", tmp_path / "onnx", "--onnx").exit_code == 0
    graph = onnx.load(tmp_path / "onnx/model.onnx").graph
    held = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
    size = {row["form"]: row["parameters"] for row in run.read_report()["costs"]["rows"]}
    assert size["compacted"] - size["base"] < 0.2 * (size["dense"] - size["base"])
    assert abs(held - size["compacted"]) < 0.2 * (size["dense"] - size["compacted"])  # statistics, constants
