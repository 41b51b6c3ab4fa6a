"""What the report draws of a picture task's answers, and the worst mistakes with their pictures."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from peftcli.config.schema import ImageConfig
from peftcli.data.rows import Rows
from peftcli.models.image_reader import ImageReader
from peftcli.tasks.images.outcome import Outcome
from peftcli.tasks.images.task import ImagesTask


def test_confusions_and_reliability_by_hand():
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]).log()
    found = Outcome(logits, ["good", "bad"], 1, False).drawn([[0], [0], [1]])
    assert found["confusion"] == {"labels": ["good", "bad"], "counts": [[1, 1], [1, 0]]}
    assert [(round(b["confidence"], 3), b["accuracy"]) for b in found["reliability"]] == [(0.7, 0), (0.8, 0), (0.9, 1)]
    several = Outcome(torch.tensor([[2.0, -2.0]]), ["a", "b"], None, True).drawn([[0, 1]])
    assert set(several) == {"reliability"}
    assert several["reliability"][0]["accuracy"] == 0.5
    assert several["reliability"][0]["rows"] == 2


class Brightness(torch.nn.Module):
    """Says `bright` of a picture as far as it is bright."""

    def forward(self, pixel_values):
        mean = pixel_values.mean((1, 2, 3))
        return SimpleNamespace(logits=torch.stack([mean, 1 - mean], 1) * 10)


@pytest.mark.parametrize("size", [8, 300])
def test_the_worst_mistakes_come_with_their_pictures(size):
    def row(number: int, value: int, label: str) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "PNG")
        return {"image": {"bytes": buffer.getvalue(), "path": f"{number}.png"}, "label": label, "row": number}

    rows = [row(30, 250, "bright"), row(10, 200, "dark"), row(20, 5, "dark"), row(40, 255, "dark")]
    reader = ImageReader("mine", size, size, mean=(0.0,) * 3, std=(1.0,) * 3)
    task = ImagesTask(ImageConfig())
    task.labels = ["bright", "dark"]
    encoded = task.encode_split(Rows.from_list(rows), reader)
    found = task.evaluate(Brightness(), encoded, reader, batch_size=3, device="cpu", generate=True)
    assert found.answers["confusion"]["counts"] == [[1, 0], [2, 1]]
    worst = found.answers["worst"]
    assert [(one["row"], one["expected"], one["predicted"]) for one in worst] == [
        (40, "dark", "bright"),
        (10, "dark", "bright"),
    ]
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["picture"].partition(",")[2]))) for one in worst]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255,) * 3, (200,) * 3]
    assert pictures[0].size == (min(size, 96),) * 2
    assert task.evaluate(Brightness(), encoded, reader, batch_size=2, device="cpu").answers == {}


def test_the_first_frame_stands_for_an_animation_where_the_recipe_says_so():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    rows = Rows.from_list([{"image": {"bytes": buffer.getvalue(), "path": "a.gif"}, "label": "a", "row": 0}])
    reader = ImageReader("mine", 8, 8)
    kept = {}
    for animated in ("error", "first"):
        task = ImagesTask(ImageConfig(animated=animated))
        task.labels = ["a", "b"]
        kept[animated] = task.encode_split(rows, reader)
    assert [len(kept["error"]), len(kept["first"])] == [0, 1]
    assert "animated" in str(kept["error"].bad[0])
    assert (kept["first"].take([0])[0]["pixels"] == (255, 0, 0)).all()
