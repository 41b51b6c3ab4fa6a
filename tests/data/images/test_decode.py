"""Every odd kind of picture becomes upright RGB of the right values, or is refused by the right name."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from peftcli.data.images.decode import MOST_PIXELS, ImageProblem, look, read

RAMP_HW = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR_HWC = np.stack([RAMP_HW, 255 - RAMP_HW, np.roll(RAMP_HW, 3, axis=1)], axis=2)


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def problem(source, **options) -> str:
    with pytest.raises(ImageProblem) as caught:
        read(source, **options)
    assert str(caught.value) == f"{caught.value.kind}: {caught.value.detail}"
    return caught.value.kind


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_plain_colour_is_exact(form):
    found = look(encoded(COLOUR_HWC, form))
    assert (found.pixels_HWC == COLOUR_HWC).all()
    assert (found.pixels_HWC.dtype, found.oddities) == (np.uint8, ())
    found.pixels_HWC[0, 0] = 1  # the caller's own, not a read-only view of the decoder's


def test_bytes_and_paths_are_the_same(tmp_path):
    data = encoded(COLOUR_HWC)
    path = tmp_path / "a picture"  # no ending: the content decides
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert (read(source) == COLOUR_HWC).all()


def test_grey_and_one_bit_get_three_equal_channels():
    found = look(encoded(RAMP_HW))
    assert (found.pixels_HWC == RAMP_HW[..., None]).all()
    assert found.pixels_HWC.shape == (6, 8, 3)
    assert found.oddities == ("grey",)
    bits = Image.fromarray(np.where(RAMP_HW > 100, 255, 0).astype(np.uint8)).convert("1")
    assert (read(encoded(bits)) == np.where(RAMP_HW > 100, 255, 0)[..., None]).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(form):
    deep_HW = np.array([[0, 257, 32768, 65535], [128, 129, 40000, 65278]], np.uint16)
    found = look(encoded(deep_HW, form))
    expected = np.round(deep_HW / 257).astype(np.uint8)
    assert (found.pixels_HWC == expected[..., None]).all()
    assert found.oddities == ("grey", "16-bit")


def test_transparency_is_laid_on_white():
    solid = np.full((4, 4, 4), (200, 0, 0, 255), np.uint8)
    solid[0] = (200, 0, 0, 0)
    solid[1] = (200, 0, 0, 51)
    found = look(encoded(solid))
    assert found.oddities == ("transparent",)
    assert (found.pixels_HWC[0] == 255).all()
    assert (found.pixels_HWC[1] == (244, 204, 204)).all()
    assert (found.pixels_HWC[2:] == (200, 0, 0)).all()
    grey = np.stack([np.full((4, 4), 10, np.uint8), np.full((4, 4), 0, np.uint8)], axis=2)
    assert (read(encoded(Image.fromarray(grey, "LA"))) == 255).all()


def test_palette_with_and_without_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.putdata([0, 1, 2])
    assert read(encoded(image)).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 255, 0]]]
    assert look(encoded(image)).oddities == ("palette",)
    for data in (encoded(image, transparency=1), encoded(image, transparency=b"\xff\x00\xff")):
        found = look(data)
        assert found.pixels_HWC.tolist() == [[[0, 0, 0], [255, 255, 255], [0, 255, 0]]]
        assert found.oddities == ("transparent", "palette")
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (9, 9, 9))
    assert read(encoded(keyed, transparency=(9, 9, 9))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_cmyk_and_other_colour_spaces():
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for form in ("JPEG", "TIFF"):
        found = look(encoded(ink, form))
        assert found.oddities == ("CMYK",)
        assert np.abs(found.pixels_HWC.astype(int) - (255, 0, 0)).max() <= 3
    yellow = Image.new("RGB", (8, 8), (250, 240, 10)).convert("YCbCr")
    assert np.abs(read(encoded(yellow, "TIFF")).astype(int) - (250, 240, 10)).max() <= 3
    assert problem(encoded(Image.new("F", (2, 2), 0.5), "TIFF")) == "unsupported"
    assert problem(encoded(Image.new("I", (2, 2), 70000), "TIFF")) == "unsupported"
    assert problem(encoded(Image.new("LAB", (2, 2)), "TIFF")) == "unsupported"


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a)), (8, lambda a: np.rot90(a, -1)),
     (2, lambda a: a[:, ::-1]), (5, lambda a: a.transpose(1, 0, 2))],
)  # fmt: skip
def test_a_turn_noted_in_exif_is_made(orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = look(encoded(np.ascontiguousarray(stored(COLOUR_HWC)), exif=exif))
    assert (found.pixels_HWC == COLOUR_HWC).all()
    assert found.oddities == (("rotated",) if orientation != 1 else ())


def test_damaged_exif_does_not_lose_the_picture():
    assert read(encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\x00\x00junk")).shape == (8, 8, 3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_several_frames_are_an_error_or_the_first(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert problem(data) == "animated"
    found = look(data, animated="first")
    assert (found.pixels_HWC == (255, 0, 0)).all()
    assert "animated" in found.oddities
    assert (read(encoded(frames[1], form, save_all=True, **options)) == (0, 0, 255)).all()


def test_a_camera_file_with_a_second_view_is_no_animation():
    views = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(views[0], "MPO", save_all=True, append_images=views[1:])
    assert np.abs(read(data).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_a_file_that_was_cut_off(form):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    data = encoded(noise, form)
    assert problem(data[: len(data) // 2]) in ("truncated", "damaged")
    assert problem(data[:5]) in ("not-an-image", "damaged")


def test_not_a_picture():
    assert problem(b"") == "empty"
    assert problem(b"label,text\n1,hello\n") == "not-an-image"
    assert problem(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not-an-image"
    assert problem("/nowhere/a.png") == "missing"


def png_header(width: int, height: int, body: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 12_000, 60_000])
def test_a_bomb_is_refused_before_its_pixels_are_decoded(side):
    data = png_header(side, side, zlib.compress(bytes(1000)))
    tracemalloc.start()
    assert problem(data) == "too-large"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert side * side > MOST_PIXELS


def test_the_limit_is_exact():
    data = encoded(np.zeros((10, 10, 3), np.uint8))
    assert read(data, most_pixels=100).shape == (10, 10, 3)
    assert problem(data, most_pixels=99) == "too-large"


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1)])
def test_strips_are_read_and_remarked_on(shape):
    found = look(encoded(np.zeros((*shape, 3), np.uint8)))
    assert found.pixels_HWC.shape == (*shape, 3)
    assert found.oddities == (("strip",) if shape != (1, 1) else ())


def test_a_problem_survives_the_way_out_of_a_worker():
    problem = pickle.loads(pickle.dumps(ImageProblem("truncated", "12 bytes are missing")))
    assert (problem.kind, problem.detail) == ("truncated", "12 bytes are missing")
