"""Characters drawn in the fonts that come with matplotlib: many classes of few pictures, after the manner of Omniglot.

Nothing is downloaded. A class is a character; its pictures are the fonts that have it, each turned, slanted and moved
a little by a hash of font and character. H and W pixels.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from peftcli.data.sampler import generator
from peftcli.data.samples import store
from peftcli.data.samples.table import write

FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic",
    "STIXGeneralBolIta",
)  # fmt: skip
REFERENCE = "DejaVuSans"
"""The font in which characters of different scripts that look the same are found."""
ALPHABETS = {
    "latin": [*range(0x41, 0x5B), *range(0x61, 0x7B)],
    "latin with marks": range(0xC0, 0x180),
    "greek": range(0x386, 0x3CF),
    "cyrillic": range(0x400, 0x482),
    "armenian": range(0x531, 0x588),
    "georgian": range(0x10D0, 0x10F7),
    "arrows": range(0x2190, 0x21B0),
    "mathematics": range(0x2200, 0x2280),
}
SIDE, SIZE = 48, 32
"""Pixels of a picture's side, and of the font."""
LEAST = 8
"""Fonts that a character needs to be a class."""
ALIKE = 0.06
"""Characters that differ in a smaller share of their ink, in the reference font, are one."""


def convert(_source: Path, out: Path) -> dict:
    """`image` (48 x 48 gray), `label` (the character), `alphabet`, `font`, `name`; one split, `train`."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {name: ImageFont.truetype(str(folder / f"{name}.ttf"), SIZE) for name in FONTS}
    kept = {name: store.sha256(folder / f"{name}.ttf") for name in FONTS}
    missing = {name: _picture(font, "\ufffe") for name, font in fonts.items()}
    rows = []
    for alphabet, characters in _different(fonts[REFERENCE], missing[REFERENCE]).items():
        for character in characters:
            seen = [(name, font) for name, font in fonts.items() if _has(font, character, missing[name])]
            if len(seen) >= LEAST:
                rows += [_row(alphabet, character, name, font) for name, font in seen]
    write(out, "train", rows, image="image")
    licences = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("LICENSE_*"))]
    (out / "LICENSE").write_text("\n\n".join(licences), encoding="utf-8")
    classes = len({row["label"] for row in rows})
    return {"splits": "none: classes are to be split", "rows": {"train": len(rows)}, "classes": classes, "fonts": kept}


def _different(font: ImageFont.FreeTypeFont, missing: np.ndarray) -> dict[str, list[str]]:
    """The characters of each alphabet that the font has, without those that look like an earlier one."""
    seen: list[np.ndarray] = []
    found: dict[str, list[str]] = defaultdict(list)
    for alphabet, codes in ALPHABETS.items():
        for code in codes:
            pixels = _picture(font, chr(code))
            if not pixels.any() or np.array_equal(pixels, missing) or any(_alike(pixels, other) for other in seen):
                continue
            seen.append(pixels)
            found[alphabet].append(chr(code))
    return found


def _alike(one_HW: np.ndarray, other_HW: np.ndarray) -> bool:
    gap = np.abs(one_HW.astype(int) - other_HW).sum()
    return gap < ALIKE * max(int(one_HW.sum()), int(other_HW.sum()))


def _has(font: ImageFont.FreeTypeFont, character: str, missing: np.ndarray) -> bool:
    pixels = _picture(font, character)
    return bool(pixels.any()) and not np.array_equal(pixels, missing)


def _picture(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """White on black in the middle, uint8 [H, W]."""
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((SIDE / 2, SIDE / 2), character, fill=255, font=font, anchor="mm")
    return np.asarray(image)


def _row(alphabet: str, character: str, name: str, font: ImageFont.FreeTypeFont) -> dict[str, Any]:
    dice = generator("glyphs", name, character)
    turn, slant = math.radians(dice.uniform(-12, 12)), dice.uniform(-0.2, 0.2)
    scale, (right, down) = dice.uniform(0.8, 1.2), dice.uniform(-4, 4, 2)
    a, b = math.cos(turn) / scale, (math.sin(turn) + slant) / scale
    c, d = -math.sin(turn) / scale, math.cos(turn) / scale
    middle = SIDE / 2
    moved = (a, b, middle - a * (middle + right) - b * (middle + down), c, d,
             middle - c * (middle + right) - d * (middle + down))  # fmt: skip
    image = Image.fromarray(_picture(font, character))
    image = image.transform((SIDE, SIDE), Image.Transform.AFFINE, moved, Image.Resampling.BICUBIC)
    pixels = 255 - np.asarray(image)  # ink on paper
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    label = f"{ord(character):04X}"
    picture = {"bytes": buffer.getvalue(), "path": f"{label}_{name}.png"}
    return {"image": picture, "label": label, "alphabet": alphabet, "font": name, "name": picture["path"]}
