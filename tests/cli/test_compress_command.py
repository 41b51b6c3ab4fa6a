"""`peft compress`: from a finished run over generated pictures to a smaller model that stands by itself."""

from __future__ import annotations

import pytest

from peftcli.artifacts.run_folder import RunFolder, run_folders
from peftcli.methods.lora.settings import Settings as Lora
from tests import pictures


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
