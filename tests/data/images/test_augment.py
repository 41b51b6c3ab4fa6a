"""Changes keep shape and type, come from the generator alone, and do what their numbers say; mixtures add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from peftcli.config.schema import AugmentConfig
from peftcli.data.images import augment
from peftcli.data.sampler import generator

RANDOM_HWC = generator("picture").integers(0, 256, (40, 56, 3), dtype=np.uint8)
ALL = AugmentConfig(flip=True, flip_vertical=True, crop=0.4, colour=0.4, rotation=20, randaugment=2)
EACH = {
    "flip": AugmentConfig(flip=True),
    "flip_vertical": AugmentConfig(flip_vertical=True),
    "crop": AugmentConfig(crop=0.3),
    "colour": AugmentConfig(colour=0.5),
    "rotation": AugmentConfig(rotation=30),
    "randaugment": AugmentConfig(randaugment=2),
    "all": ALL,
}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("shape", [(40, 56), (1, 500), (500, 1), (1, 1), (8, 8)])
def test_shape_and_type_stay_and_equal_draws_are_equal_pictures(name, shape):
    change = augment.parse(EACH[name])
    pixels_HWC = np.resize(RANDOM_HWC, (*shape, 3))
    before = pixels_HWC.copy()
    for row in range(12):
        first, again = (change(pixels_HWC, generator("augment", 0, row)) for _ in range(2))
        assert (first.shape, first.dtype) == (pixels_HWC.shape, np.uint8)
        assert (first == again).all()
    assert (pixels_HWC == before).all()


@pytest.mark.parametrize("name", EACH)
def test_other_draws_are_other_pictures(name):
    change = augment.parse(EACH[name])
    seen = {change(RANDOM_HWC, generator("augment", row)).tobytes() for row in range(16)}
    assert len(seen) == 2 if name.startswith("flip") else len(seen) > 10


def test_the_default_changes_nothing():
    assert augment.parse(AugmentConfig()) is None
    assert augment.parse(AugmentConfig(mixup=0.2, cutmix=1.0)) is None


def test_mirrors_are_exact():
    for config, mirrored in (
        (AugmentConfig(flip=True), RANDOM_HWC[:, ::-1]),
        (AugmentConfig(flip_vertical=True), RANDOM_HWC[::-1]),
    ):
        found = [augment.parse(config)(RANDOM_HWC, generator(row)) for row in range(200)]
        turned = sum((one == mirrored).all() for one in found)
        assert turned + sum((one == RANDOM_HWC).all() for one in found) == 200
        assert 70 < turned < 130


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 0.95), st.integers(0, 2**31))
def test_a_window_is_inside_and_of_the_asked_area(width, height, least, seed):
    left, top, right, bottom = augment.window(width, height, least, generator(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    wide, high = right - left, bottom - top
    if (wide, high) != (width, height):
        assert least * width * height - wide / 2 - high / 2 - 1 <= wide * high
        assert 3 / 4 * (1 - 1 / wide - 1 / high) - 0.1 <= wide / high <= 4 / 3 * (1 + 1 / wide + 1 / high) + 0.8


def test_colour_moves_brightness_within_its_bound():
    grey_HWC = np.full((8, 8, 3), 100, np.uint8)
    values = [augment.parse(AugmentConfig(colour=0.2))(grey_HWC, generator(i))[0, 0, 0] for i in range(300)]
    assert 80 <= min(values) < 85
    assert 115 < max(values) <= 120


def test_a_turn_fills_its_corners_with_grey():
    white_HWC = np.full((32, 32, 3), 255, np.uint8)
    found = [augment.parse(AugmentConfig(rotation=45))(white_HWC, generator(i)) for i in range(30)]
    assert any((one[0, 0] == 128).all() for one in found)
    assert all((one[16, 16] == 255).all() for one in found)


def test_the_table_of_randaugment():
    image = Image.fromarray(RANDOM_HWC)
    assert set(augment.OPERATIONS) == {
        "identity", "autocontrast", "equalize", "rotate", "solarize", "colour", "posterize", "contrast", "brightness",
        "sharpness", "shear-x", "shear-y", "translate-x", "translate-y",
    }  # fmt: skip
    for name, change in augment.OPERATIONS.items():
        if name not in ("autocontrast", "equalize"):
            assert (np.array(change(image, 0)) == RANDOM_HWC).all(), name
        for by in (1.0, -1.0) if name in augment.SIGNED else (1.0,):
            found = np.array(change(image, by))
            assert (found.shape, found.dtype) == (RANDOM_HWC.shape, np.uint8)
            assert name in ("identity", "autocontrast", "equalize") or (found != RANDOM_HWC).any(), name


def test_operations_at_full_strength_by_hand():
    change = {name: lambda a, by, f=f: np.array(f(Image.fromarray(a), by)) for name, f in augment.OPERATIONS.items()}
    value = np.full((20, 20, 3), 100, np.uint8)
    assert (change["brightness"](value, 1) == 190).all()
    assert (change["brightness"](value, -1) == 10).all()
    assert (change["posterize"](RANDOM_HWC, 1) == RANDOM_HWC // 16 * 16).all()
    assert (change["solarize"](RANDOM_HWC, 1) == 255 - RANDOM_HWC).all()
    moved = change["translate-x"](RANDOM_HWC, 25 / 56 / 0.45)
    assert (moved[:, :30] == RANDOM_HWC[:, 25:55]).all()
    assert (moved[:, 31:] == 128).all()


def batch(rows=6, height=10, width=14, classes=4):
    draw = torch.Generator().manual_seed(3)
    targets = torch.nn.functional.one_hot(torch.arange(rows) % classes, classes).float()
    return torch.rand(rows, 3, height, width, generator=draw), targets


def mix(pixels, targets, config, draw):
    """Each picture with another one of the batch."""
    other = draw.permutation(len(pixels)).tolist()
    return augment.mix(pixels, targets, pixels[other], targets[other], config, draw)


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=1.0, cutmix=1.0)]
)
def test_mixed_labels_sum_to_one_and_are_reproducible(config):
    pixels, targets = batch()
    shares = set()
    for i in range(40):
        mixed, soft = mix(pixels, targets, config, generator("mix", i))
        again, soft_again = mix(pixels, targets, config, generator("mix", i))
        assert torch.equal(mixed, again)
        assert torch.equal(soft, soft_again)
        assert torch.allclose(soft.sum(1), torch.ones(6), atol=1e-6)
        assert mixed.shape == pixels.shape
        assert pixels.min() <= mixed.min()
        assert mixed.max() <= pixels.max() + 1e-6
        shares.add(round(float(soft[0].max()), 5))
    assert len(shares) > 10


def test_mixup_mixes_pictures_and_labels_in_the_same_share():
    _, targets = batch(rows=4)
    values = torch.arange(4.0)[:, None, None, None].expand(4, 3, 10, 14)
    for i in range(20):
        mixed, soft = mix(values, targets, AugmentConfig(mixup=1.0), generator(i))
        assert torch.allclose(mixed[:, 0, 0, 0], soft @ torch.arange(4.0), atol=1e-5)


def test_cutmix_counts_the_pasted_area_exactly():
    _, targets = batch(rows=4)
    values = torch.arange(4.0)[:, None, None, None].expand(4, 3, 10, 14)
    partial = 0
    for i in range(60):
        mixed, soft = mix(values, targets, AugmentConfig(cutmix=1.0), generator(i))
        for row in range(4):
            share = [(mixed[row, 0] == value).float().mean() for value in range(4)]
            assert torch.allclose(soft[row], torch.tensor(share), atol=1e-6)
        partial += float(soft.max(1).values.min()) < 1
    assert partial > 30


def test_both_take_turns():
    pixels, targets = batch()
    cuts = 0
    for i in range(200):
        mixed, _ = mix(pixels, targets, AugmentConfig(mixup=1.0, cutmix=1.0), generator(i))
        own = torch.isin(mixed, pixels).all()
        cuts += int(own)
    assert 70 < cuts < 130


def test_a_batch_of_one_stays_itself():
    pixels, targets = batch(rows=1)
    for config in (AugmentConfig(mixup=0.3), AugmentConfig(cutmix=1.0)):
        mixed, soft = mix(pixels, targets, config, generator(1))
        assert torch.allclose(mixed, pixels)
        assert torch.allclose(soft, targets)
