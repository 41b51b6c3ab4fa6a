"""Draw pictures of surfaces, sound and defective: brushed metal, fabric and tiles with scratches, stains and dents.

For trying a detector of defects where there is no camera. Each picture is drawn from its own number and a seed: the
same command draws the same pictures, no two of them alike. Faint defects are among them on purpose. H, W pixels.

Usage: python scripts/generate_defects.py FOLDER [--good 120] [--bad 60] [--new 20] [--seed 0]
writes FOLDER/good, FOLDER/bad and, beside FOLDER, a folder `new` in which names say nothing; every third one is bad.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224
SURFACES = ("metal", "fabric", "tiles")
DEFECTS = ("scratch", "stain", "dent")
FAINT, CLEAR = 0.35, 1.0
"""Strength of the faintest and of the clearest defect."""


def draw(number: int, bad: bool, seed: int = 0, side: int = SIDE) -> Image.Image:
    """A surface in its light, with one or two defects where it is bad, as a camera would give it."""
    dice = np.random.default_rng([seed, number, int(bad)])
    light_HW3 = SURFACE[SURFACES[dice.integers(len(SURFACES))]](dice, side)
    for _ in range(dice.integers(1, 3) if bad else 0):
        strength = dice.uniform(FAINT, CLEAR)
        light_HW3 = DEFECT[DEFECTS[dice.integers(len(DEFECTS))]](light_HW3, dice, strength)
    down_HW, across_HW = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    slope = dice.normal(0, 0.06, 2)
    lamp_HW = dice.uniform(0.85, 1.1) * (1 + slope[0] * down_HW + slope[1] * across_HW)
    noise_HW3 = dice.normal(0, 2.0, light_HW3.shape)
    return Image.fromarray(np.clip(light_HW3 * lamp_HW[..., None] + noise_HW3, 0, 255).astype(np.uint8))


def smooth(dice: np.random.Generator, side: int, down: int, across: int) -> np.ndarray:
    """A random relief [H, W] of mean 0 and spread 1 with so many hills down and across."""
    coarse = Image.fromarray(dice.normal(size=(max(2, down), max(2, across))).astype(np.float32))
    relief_HW = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return (relief_HW - relief_HW.mean()) / relief_HW.std()


def metal(dice: np.random.Generator, side: int) -> np.ndarray:
    """Lines of a brush in a grey that leans to blue or brown."""
    lines_HW = 9 * smooth(dice, side, side, 6) + 5 * smooth(dice, side, side // 2, 3) + 4 * smooth(dice, side, 4, 4)
    return (dice.uniform(120, 175) + lines_HW)[..., None] * (1 + np.array([-0.02, 0, 0.03]) * dice.uniform(-1, 1.5))


def fabric(dice: np.random.Generator, side: int) -> np.ndarray:
    """Threads over and under each other, a little uneven, in some colour."""
    down_HW, across_HW = np.mgrid[0:side, 0:side] + 1.5 * np.stack([smooth(dice, side, 5, 5) for _ in range(2)])
    pitch = dice.uniform(7, 11)
    over_HW = np.sin(2 * np.pi * down_HW / pitch) * np.sin(2 * np.pi * across_HW / pitch)
    relief_HW = 22 * over_HW + 5 * smooth(dice, side, side // 3, side // 3) + 4 * smooth(dice, side, 3, 3)
    return (dice.uniform(95, 150) + relief_HW)[..., None] * dice.uniform(0.7, 1.2, 3)


def tiles(dice: np.random.Generator, side: int) -> np.ndarray:
    """Glazed squares, each a little lighter or darker than the next, with joints between them."""
    pitch, joint = int(dice.integers(52, 76)), int(dice.integers(3, 5))
    down, across = (np.arange(side) + dice.integers(0, pitch) for _ in range(2))
    shade_HW = dice.normal(0, 5, (side // pitch + 2, side // pitch + 2))[np.ix_(down // pitch, across // pitch)]
    is_joint_HW = (down % pitch < joint)[:, None] | (across % pitch < joint)[None]
    glaze_HW = dice.uniform(165, 205) + shade_HW + 3 * smooth(dice, side, side // 5, side // 5)
    joint_HW = 105 + 7 * smooth(dice, side, side // 2, side // 2)
    return np.where(is_joint_HW, joint_HW, glaze_HW)[..., None] * np.array([1.0, 0.985, 0.95])


def scratch(light_HW3: np.ndarray, dice: np.random.Generator, strength: float) -> np.ndarray:
    """A thin bent line, lighter or darker than what is around it."""
    side, finer = len(light_HW3), 4
    angle, bend = dice.uniform(0, 2 * np.pi), dice.normal(0, 0.5)
    at, points = dice.uniform(0.2, 0.8, 2) * side, []
    for _ in range(9):
        points.append(tuple(finer * at))
        at = at + dice.uniform(0.03, 0.07) * side * np.array([np.cos(angle), np.sin(angle)])
        angle += bend / 8 + dice.normal(0, 0.06)
    mask = Image.new("L", (finer * side, finer * side))
    ImageDraw.Draw(mask).line(points, fill=255, width=int(dice.integers(4, 10)), joint="curve")
    mask_HW = np.asarray(mask.resize((side, side), Image.Resampling.BOX), np.float32) / 255
    return light_HW3 + dice.choice([-1, 1]) * (40 + 50 * strength) * mask_HW[..., None]


def stain(light_HW3: np.ndarray, dice: np.random.Generator, strength: float) -> np.ndarray:
    """A spot without a firm edge that takes light away, some colours more than others."""
    side = len(light_HW3)
    down_HW, across_HW = np.mgrid[0:side, 0:side] - dice.uniform(0.2, 0.8, (2, 1, 1)) * side
    radius_HW = dice.uniform(0.06, 0.13) * side * (1 + 0.3 * smooth(dice, side, 6, 6))
    inside_HW = 1 / (1 + np.exp((np.hypot(down_HW, across_HW) - radius_HW) / dice.uniform(1, 3)))
    return light_HW3 * (1 - strength * inside_HW[..., None] * dice.uniform([0.15, 0.25, 0.3], [0.3, 0.45, 0.55]))


def dent(light_HW3: np.ndarray, dice: np.random.Generator, strength: float) -> np.ndarray:
    """A hollow: what it shows is moved, one side of it lies in the light and the other in the shade."""
    side, radius = len(light_HW3), dice.uniform(0.06, 0.12) * len(light_HW3)
    away = np.mgrid[0:side, 0:side] - dice.uniform(0.2, 0.8, (2, 1, 1)) * side
    deep_HW = np.exp(-(away**2).sum(0) / radius**2)
    moved = np.mgrid[0:side, 0:side] - 0.5 * strength * away * deep_HW
    down_HW, across_HW = np.clip(np.rint(moved), 0, side - 1).astype(int)
    angle = dice.uniform(0, 2 * np.pi)
    slope_HW = (away[0] * np.sin(angle) + away[1] * np.cos(angle)) / radius * deep_HW
    return light_HW3[down_HW, across_HW] * (1 + 0.65 * strength * slope_HW[..., None])


SURFACE = {"metal": metal, "fabric": fabric, "tiles": tiles}
DEFECT = {"scratch": scratch, "stain": stain, "dent": dent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--good", type=int, default=120)
    parser.add_argument("--bad", type=int, default=60)
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    new = options.folder.parent / "new"
    for folder in (options.folder / "good", options.folder / "bad", new):
        folder.mkdir(parents=True, exist_ok=True)
    for label, count in (("good", options.good), ("bad", options.bad)):
        for number in range(count):
            draw(number, label == "bad", options.seed).save(options.folder / label / f"{number:04}.jpg", quality=92)
    for place in range(options.new):  # with numbers of no picture above
        bad = place % 3 == 2
        number = place + (options.bad if bad else options.good)
        draw(number, bad, options.seed).save(new / f"{place:04}.jpg", quality=92)
    print(f"{options.good} good and {options.bad} bad pictures in {options.folder}, {options.new} others in {new}")


if __name__ == "__main__":
    main()
