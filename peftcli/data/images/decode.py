"""A picture file as pixels: one shape whatever was in it, and a name for what is wrong. H, W pixels.

Only the first frame is ever decoded, and nothing before the header's size was found to be affordable.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is opened at all. Pillow knows more, among them PostScript, which it gives to another program to run."""
MOST_PIXELS = 64_000_000
"""About 200 MB as RGB. A camera's largest picture fits; a file that unpacks to gigabytes does not."""
STRIP = 20
"""A side this many times the other is worth a remark: scaled to a square, little of it is left."""
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's limit is above ours
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")

Kind = Literal["missing", "empty", "not-an-image", "too-large", "animated", "truncated", "damaged", "unsupported"]
Animated = Literal["error", "first"]
Source = bytes | str | Path
"""The file's bytes or its path."""


class ImageProblem(Exception):
    """Why a picture cannot be used.

    Args:
        kind: One of `Kind`, to count by.
        detail: What was found, for a message.
    """

    def __init__(self, kind: Kind, detail: str):
        self.kind, self.detail = kind, detail
        super().__init__(f"{kind}: {detail}")

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process hands it over
        return ImageProblem, (self.kind, self.detail)


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        pixels_HWC: RGB, uint8 [H, W, 3], upright.
        oddities: What was not plain 8-bit RGB: grey, palette, transparent, 16-bit, CMYK, other colours, rotated,
            animated, strip.
    """

    pixels_HWC: np.ndarray
    oddities: tuple[str, ...]


def read(source: Source, animated: Animated = "error", most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The pixels of a picture, RGB uint8 [H, W, 3]; `look` says more.

    Raises:
        ImageProblem: It cannot be used.
    """
    return look(source, animated, most_pixels).pixels_HWC


def look(source: Source, animated: Animated = "error", most_pixels: int = MOST_PIXELS) -> Picture:
    """Decode a picture and say what was unusual about it.

    Grey becomes three equal channels, 16 bits are scaled to 8 (65535 is 255), transparency is laid on white, CMYK is
    converted without its profile, and a turn noted in EXIF is made.

    Args:
        source: The file's bytes or its path.
        animated: Whether several frames or pages are a mistake, or the first one stands for all.
        most_pixels: Largest width times height; checked before any pixel is decoded.

    Raises:
        ImageProblem: It cannot be used.
    """
    try:
        with _opened(source) as file:
            return _decode(file, animated, most_pixels)
    except Image.DecompressionBombError:
        raise ImageProblem("too-large", f"more than {most_pixels:,} pixels, the most that are decoded") from None
    except (ImageProblem, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more for bad bytes
        cut = "truncat" in str(error).lower()
        raise ImageProblem("truncated" if cut else "damaged", str(error) or type(error).__name__) from None


def _opened(source: Source) -> BinaryIO:
    """The file, of which no more is read than its header before its size is known."""
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    else:
        path = Path(source)
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise ImageProblem("not-an-image", "it is no file")
            file = path.open("rb")
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            raise ImageProblem("missing", f"{source}: {getattr(error, 'strerror', error)}") from None
    if file.seek(0, io.SEEK_END) == 0:
        raise ImageProblem("empty", "the file has no bytes")
    file.seek(0)
    return file


def _decode(file: BinaryIO, animated: Animated, most_pixels: int) -> Picture:
    Image.init()  # Image.open with `formats` looks only among those already loaded
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        what = f"no picture of a known format; it begins with {file.read(8)!r}"
        raise ImageProblem("not-an-image", what) from None
    with opened as image:
        width, height = image.size
        if width * height > most_pixels:
            raise ImageProblem("too-large", f"{width} x {height} pixels, at most {most_pixels:,} are decoded")
        # A camera's MPO holds another view or a preview after the picture itself; it is no animation.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1 and animated == "error":
            raise ImageProblem("animated", f"{frames} frames or pages")
        odd = _oddities(image)
        if frames > 1:
            image.seek(0)
        image.load()
        upright = ImageOps.exif_transpose(image)
        turned = ["rotated"] * (image.getexif().get(0x0112, 1) != 1)
        shape = ["strip"] * (max(width, height) > STRIP * min(width, height))
        # Pillow gives 16-bit PNM as "I" scaled to 0..65535; the "I" of a TIFF is 32 bits of an unknown range.
        deep = image.mode in DEEP or (image.mode == "I" and image.format in ("PNG", "PPM"))
        pixels_HWC = _from_16_bits(upright) if deep else _rgb(upright)
        return Picture(pixels_HWC, (*odd, *turned, *["animated"] * (frames > 1), *shape))


def _oddities(image: Image.Image) -> list[str]:
    """What its mode says, before decoding: a GIF changes its mode while it is read."""
    mode = image.mode
    found = ["transparent"] * (image.has_transparency_data)
    if mode in ("L", "LA", "La", "1") or mode.startswith("I"):
        found.append("grey")
    if mode.startswith("I"):
        found.append("16-bit")
    if mode in ("P", "PA"):
        found.append("palette")
    if mode == "CMYK":
        found.append("CMYK")
    return found or ["other colours"] * (mode not in ("RGB", "RGBA", "RGBX"))


def _from_16_bits(image: Image.Image) -> np.ndarray:
    grey_HW = np.asarray(image).astype(np.uint32)
    return np.repeat(((grey_HW + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ("I", "F", "LAB"):
        raise ImageProblem("unsupported", f"pixels of mode {image.mode}: convert to 8 or 16 bits of grey or RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
