"""Random changes of training pictures, by Pillow and NumPy. B rows, C channels, H, W pixels, K classes.

Every draw comes from the generator that is passed in: equal generators give equal pictures. One keyed by seed, epoch
and row (`peftcli.data.sampler.generator`) makes a picture's change independent of batch, worker and resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from peftcli.config.schema import AugmentConfig

GREY = (128, 128, 128)
"""What stands where a turned or moved picture leaves nothing."""
RATIO = (3 / 4, 4 / 3)
TRIES = 10
STRONGEST = 30.0
"""RandAugment's highest strength; the table below holds what each operation does there."""

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Pixels uint8 [H, W, 3] and a generator -> pixels of the same shape and type."""
Operation = Callable[[Image.Image, float], Image.Image]
"""A picture and a strength: 0 to 1, or -1 to 1 where the operation has two directions."""


def parse(settings: AugmentConfig) -> Augment | None:
    """What is done to each training picture by itself; None where nothing is.

    In this order: crop, mirror, turn, colour, RandAugment.
    """
    steps: list[Callable[[Image.Image, np.random.Generator], Image.Image]] = []
    if settings.crop < 1:
        steps.append(lambda image, draw: _crop(image, settings.crop, draw))
    if settings.flip:
        steps.append(lambda image, draw: ImageOps.mirror(image) if draw.random() < 0.5 else image)
    if settings.flip_vertical:
        steps.append(lambda image, draw: ImageOps.flip(image) if draw.random() < 0.5 else image)
    if settings.rotation:
        steps.append(lambda image, draw: _turn(image, draw.uniform(-settings.rotation, settings.rotation)))
    if settings.colour:
        steps.append(lambda image, draw: _colour(image, settings.colour, draw))
    if settings.randaugment:
        share = settings.randaugment_strength / STRONGEST
        steps.append(lambda image, draw: _randaugment(image, settings.randaugment, share, draw))
    if not steps:
        return None

    def augment(pixels_HWC: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        image = Image.fromarray(pixels_HWC)
        for step in steps:
            image = step(image, draw)
        return np.array(image)

    return augment


def window(width: int, height: int, least: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of a picture: left, top, right, bottom.

    Its area is `least` to 1 of the whole and its sides stand 3:4 to 4:3 (Szegedy et al., 2015, arXiv 1409.4842); the
    whole picture where no such part was found in ten tries, as in a narrow strip.
    """
    for _ in range(TRIES):
        area = draw.uniform(least, 1) * width * height
        ratio = np.exp(draw.uniform(*np.log(RATIO)))
        wide, high = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(draw.integers(width - wide + 1)), int(draw.integers(height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height


def _crop(image: Image.Image, least: float, draw: np.random.Generator) -> Image.Image:
    return image.resize(image.size, Image.Resampling.BICUBIC, box=window(*image.size, least, draw))


def _turn(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=GREY)


def _colour(image: Image.Image, most: float, draw: np.random.Generator) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(draw.uniform(1 - most, 1 + most))
    return image


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


SIGNED: Mapping[str, Operation] = {
    "rotate": lambda image, by: _turn(image, 30 * by),
    "shear-x": lambda image, by: _moved(image, 1, 0.3 * by, 0, 0, 1, 0),
    "shear-y": lambda image, by: _moved(image, 1, 0, 0, 0.3 * by, 1, 0),
    "translate-x": lambda image, by: _moved(image, 1, 0, 0.45 * by * image.width, 0, 1, 0),
    "translate-y": lambda image, by: _moved(image, 1, 0, 0, 0, 1, 0.45 * by * image.height),
    "brightness": lambda image, by: ImageEnhance.Brightness(image).enhance(1 + 0.9 * by),
    "colour": lambda image, by: ImageEnhance.Color(image).enhance(1 + 0.9 * by),
    "contrast": lambda image, by: ImageEnhance.Contrast(image).enhance(1 + 0.9 * by),
    "sharpness": lambda image, by: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * by),
}
"""Operations with two directions."""
UNSIGNED: Mapping[str, Operation] = {
    "identity": lambda image, by: image,
    "posterize": lambda image, by: ImageOps.posterize(image, 8 - round(4 * by)),
    "solarize": lambda image, by: ImageOps.solarize(image, round(256 * (1 - by))),
    "autocontrast": lambda image, by: ImageOps.autocontrast(image),
    "equalize": lambda image, by: ImageOps.equalize(image),
}
OPERATIONS: Mapping[str, Operation] = {**SIGNED, **UNSIGNED}
"""RandAugment's fourteen (Cubuk et al., 2019, arXiv 1909.13719, section 3); at strength 0 all but the last two leave a
picture as it is."""


def _randaugment(image: Image.Image, count: int, share: float, draw: np.random.Generator) -> Image.Image:
    names = list(OPERATIONS)
    for _ in range(count):
        name = names[int(draw.integers(len(names)))]
        sign = -1 if name in SIGNED and draw.random() < 0.5 else 1
        image = OPERATIONS[name](image, sign * share)
    return image


def mix(
    pixels_BCHW: Tensor,
    targets_BK: Tensor,
    others_BCHW: Tensor,
    others_BK: Tensor,
    settings: AugmentConfig,
    draw: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Pictures mixed with others, and their soft labels in the same shares.

    Mixup: `l x + (1 - l) x'` with l from Beta(mixup, mixup) (Zhang et al., 2017, arXiv 1710.09412). Cutmix: a box of
    the area 1 - l comes from x', cut at the picture's edge, and its true area is counted (Yun et al., 2019, arXiv
    1905.04899). One l for all of them; with both on, either has a chance of a half.

    Args:
        pixels_BCHW: Pictures, floating [B, C, H, W].
        targets_BK: Shares of the labels, floating [B, K].
        others_BCHW: The picture x' of each.
        others_BK: Their shares.
        settings: `mixup` and `cutmix`, of which one is on.
        draw: The generator of the whole step, however it is cut into batches.
    """
    cut = bool(settings.cutmix) and (not settings.mixup or draw.random() < 0.5)
    kept = float(draw.beta(*(settings.cutmix if cut else settings.mixup,) * 2))
    if cut:
        height, width = pixels_BCHW.shape[-2:]
        top, bottom, left, right = box(height, width, 1 - kept, draw)
        mixed_BCHW = pixels_BCHW.clone()
        mixed_BCHW[..., top:bottom, left:right] = others_BCHW[..., top:bottom, left:right]
        kept = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        mixed_BCHW = kept * pixels_BCHW + (1 - kept) * others_BCHW
    return mixed_BCHW, kept * targets_BK + (1 - kept) * others_BK


def box(height: int, width: int, share: float, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a box of the picture's own proportions around a random pixel, cut at the edges."""
    high, wide = int(height * np.sqrt(share)), int(width * np.sqrt(share))
    top, left = int(draw.integers(height)) - high // 2, int(draw.integers(width)) - wide // 2
    return max(0, top), min(height, top + high), max(0, left), min(width, left + wide)
