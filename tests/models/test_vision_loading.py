"""What loading a model of pictures does beside reading weights: its reader, its size, its head, its BatchNorm."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor

from peftcli.config.errors import UserError
from peftcli.config.schema import ModelConfig
from peftcli.models import batch_norm, image_reader, loading, roles
from tests import pictures

LABELS = ["bad", "good"]
USUAL = {
    "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
ABOUT = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "bit": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    },
    "deit": {
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 40, "width": 40},
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
    },
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 28}, "crop_pct": 0.875},
    # As microsoft/resnet-50 has it: that the number is the shorter edge is known to the class that it names.
    "resnet": {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 28, "crop_pct": 0.875},
    "defaults": {"image_processor_type": "BitImageProcessor", "size": 40, "crop_size": 32},
    "plain": {"image_processor_type": "ViTImageProcessor", "size": 32, "do_normalize": False},
    "signed": {"image_processor_type": "ViTImageProcessor", "size": 32, "rescale_factor": 2 / 255},
    "bytes": {"image_processor_type": "ViTImageProcessor", "size": 32, "do_rescale": False},
}


def load(folder, labels=LABELS, image_size=None, **more) -> loading.LoadedModel:
    config = ModelConfig(name=str(folder), source="folder", **more)
    torch.manual_seed(3)
    return loading.load(config, "fp32", "image-classification", labels, image_size=image_size)


def read(folder, about) -> image_reader.ImageReader:
    (folder / image_reader.FILE).write_text(json.dumps(USUAL | about))
    (folder / "config.json").write_text('{"model_type": "vit"}')
    return image_reader.find(ModelConfig(name=str(folder), source="folder"), None)


@pytest.mark.parametrize("kind", ABOUT)
@pytest.mark.parametrize("shape", [(50, 70, 3), (70, 50, 3), (32, 32, 3), (9, 9, 3)], ids=str)
def test_pictures_are_read_as_transformers_reads_them(tmp_path, kind, shape) -> None:
    reader = read(tmp_path, ABOUT[kind])
    pixels_HWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mine = reader.normalise(reader.fit(pixels_HWC)[None])
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels_HWC), return_tensors="pt")
    torch.testing.assert_close(mine, theirs.pixel_values, rtol=1e-6, atol=1e-5)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    reader.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)(Image.fromarray(pixels_HWC), return_tensors="pt")
    torch.testing.assert_close(mine, again.pixel_values, rtol=1e-6, atol=1e-5)


def test_another_size_shows_the_same_view(tmp_path) -> None:
    reader = image_reader._sized(read(tmp_path, ABOUT["bit"]), 16)
    assert (reader.size, reader.edge) == (16, 20)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"size": {"height": 32, "width": 16}}, "only squares"),
        ({"size": 16, "do_center_crop": True, "crop_size": 32, "image_processor_type": "BitImageProcessor"}, "more"),
    ],
)
def test_sizes_that_are_not_read_here_are_refused(tmp_path, about, words) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, {"image_processor_type": "ViTImageProcessor"} | about)


def test_a_large_picture_is_made_smaller_before_it_is_changed_but_not_below_what_is_cut() -> None:
    reader, pixels_HWC = image_reader.ImageReader("tiny", 32, 40), np.zeros((400, 1000, 3), np.uint8)
    assert reader.reduced(pixels_HWC, 1.0).shape == (40, 100, 3)
    assert reader.reduced(pixels_HWC, 0.25).shape == (80, 200, 3)  # a quarter of it is 40 pixels high
    assert reader.reduced(pixels_HWC[:79], 1.0).shape == (79, 1000, 3)


@pytest.mark.parametrize("squash", [True, False])
def test_a_line_of_pixels_is_read_without_making_it_a_wall(squash) -> None:
    reader = image_reader.ImageReader("tiny", 32, 40, squash)
    line_HWC = np.zeros((1, 60000, 3), np.uint8)
    line_HWC[:, 29990:30010] = 255
    assert reader.fit(line_HWC).shape == (32, 32, 3)
    assert squash or reader.fit(line_HWC).min() == 255  # its middle


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_positions_are_interpolated_as_the_model_would(tmp_path, kind) -> None:
    folder = pictures.make_checkpoint(tmp_path, kind)
    pixels_BCSS = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    resized, own = load(folder, image_size=24).model, load(folder).model
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    with torch.no_grad():
        expected = own(pixel_values=pixels_BCSS, **more).logits
        torch.testing.assert_close(resized(pixel_values=pixels_BCSS).logits, expected)


def test_a_size_that_no_patches_fill_is_refused_with_those_beside_it(tmp_path) -> None:
    with pytest.raises(UserError, match=r"image_size=30 is no multiple.*\n.*28, 32"):
        load(pictures.make_checkpoint(tmp_path), image_size=30)


@pytest.mark.parametrize(
    ("former", "kept"), [(LABELS, True), (["good", "bad"], False), (["cat", "dog"], False), (["a", "b", "c"], False)]
)
def test_a_head_is_kept_only_for_the_same_labels_in_the_same_order(tmp_path, former, kept) -> None:
    shape = {"id2label": dict(enumerate(former)), "label2id": {label: i for i, label in enumerate(former)}}
    folder = pictures.make_checkpoint(tmp_path, **shape)
    before = load(folder, labels=former).model.classifier.weight
    loaded = load(folder)
    assert loaded.model.classifier.weight.shape == (2, 32)
    assert torch.equal(before[:2], loaded.model.classifier.weight) == kept
    assert bool(loaded.notes) != kept
    assert kept or f"answers with {len(former)} other labels" in loaded.notes[0]


def test_a_backbone_gets_a_head_without_a_word(tmp_path) -> None:
    from transformers import ViTModel

    from peftcli.testing import tiny

    ViTModel(tiny.vit_shape()).save_pretrained(tmp_path)
    (tmp_path / image_reader.FILE).write_text(json.dumps(USUAL | {"size": 16}))
    assert load(tmp_path).notes == []


def test_batch_norm_neither_moves_nor_looks_at_the_batch(tmp_path) -> None:
    model = load(pictures.make_checkpoint(tmp_path, "resnet")).model
    pixels_BCSS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    resting = model.eval()(pixel_values=pixels_BCSS).logits
    model.train()
    assert torch.equal(model(pixel_values=pixels_BCSS).logits, resting)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert batch_norm.awake(model) == []
    assert all(isinstance(m, nn.BatchNorm2d) for n, m in model.named_modules() if n.endswith("normalization"))


def test_a_config_says_whether_labels_may_stand_together(tmp_path) -> None:
    config = ModelConfig(name=str(pictures.make_checkpoint(tmp_path / "old")), source="folder")
    several = loading.load(config, "fp32", "image-classification", LABELS, several_labels=True).model
    assert several.config.problem_type == loading.SEVERAL
    several.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["problem_type"] == loading.SEVERAL
    assert load(tmp_path / "new").model.config.problem_type is None


def test_batch_norm_is_exact_in_a_model_of_sixteen_bits(tmp_path) -> None:
    folder = pictures.make_checkpoint(tmp_path, "resnet")
    whole = load(folder).model.state_dict()
    config = ModelConfig(name=str(folder), source="folder", batch_norm="trained")
    model = loading.load(config, "bf16", "image-classification", LABELS).model
    assert len(batch_norm.awake(model)) > 5
    for name, tensor in model.state_dict().items():
        if "normalization" in name:
            assert torch.equal(tensor, whole[name]), name
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_every_convolution_of_a_block_has_one_role(tmp_path, kind) -> None:
    loaded = load(pictures.make_checkpoint(tmp_path, "resnet", layer_type=kind))
    names = [name for name, module in loaded.model.named_modules() if isinstance(module, nn.Conv2d)]
    assert roles.resolve(loaded.model, loaded.family, ["conv", "embed"]) == names
    assert roles.resolve(loaded.model, loaded.family, ["head"]) == ["classifier"]
    assert len(roles.resolve(loaded.model, loaded.family, [f"(?:.*\\.)?{loaded.family.blocks}"])) == 3


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_every_linear_layer_of_a_transformer_has_one_role(tmp_path, kind) -> None:
    loaded = load(pictures.make_checkpoint(tmp_path, kind))
    names = [name for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear)]
    assert roles.resolve(loaded.model, loaded.family, ["all", "head"]) == names
    assert {roles.role_of(name, loaded.family) for name, _ in loaded.model.named_parameters()} <= {
        *loaded.family.roles, "",
    }  # fmt: skip


@pytest.mark.samples
def test_the_samples_load_for_pictures_of_112_pixels() -> None:
    for name in ("vit-s14", "resnet50-thin"):
        loaded = loading.load(ModelConfig(name, "sample"), "fp32", "image-classification", LABELS, image_size=112)
        assert loaded.notes == []
        assert loaded.model(pixel_values=torch.zeros(1, 3, 112, 112)).logits.shape == (1, 2)
        assert os.path.basename(str(loaded.folder)) == name
