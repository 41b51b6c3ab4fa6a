"""From pictures to what a vision model reads: what a tokenizer is to text. B rows, C channels, H x W pixels, S a side.

The numbers come from the checkpoint; the work is Pillow's, so that no other image library is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import ModelConfig
from peftcli.models.checkpoint import find_folder, plain_errors, quiet, where

FILE = "preprocessor_config.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, where a checkpoint names none."""
USUAL = 224
STRIP = 8
"""Of a picture longer than so many times its width only the middle is scaled, from which the square is cut anyway: the
whole of a line of pixels would not fit into memory."""
CONVNEXT_CROPS = 384
"""ConvNeXt's processor, which ResNet's checkpoints use, crops below this size and squashes from it on."""


@dataclass(frozen=True)
class ImageReader:
    """How pictures become pixels of one size.

    Attributes:
        name_or_path: The checkpoint.
        size: Side of the square that the model sees, in pixels.
        edge: What a picture is scaled to before the square of `size` is cut from its middle.
        squash: Scale both sides to `edge`, or the shorter one and keep the shape.
        mean: Of each colour, 0 to 1, taken off.
        std: Of each colour, divided by.
        resample: Pillow's number of the filter.
        notes: What the checkpoint left to guess.
    """

    name_or_path: str
    size: int
    edge: int
    squash: bool = True
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    resample: int = 3
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """What `fit` depends on."""
        return json.dumps([self.size, self.edge, self.squash, self.resample])

    def fit(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """A picture scaled and cut: uint8 [S, S, 3]."""
        image = Image.fromarray(pixels_HWC if self.squash else _middle(pixels_HWC))
        width, height = image.size
        scale = self.edge / min(width, height)
        to = (self.edge, self.edge) if self.squash else (_whole(width * scale), _whole(height * scale))
        if image.size != to:
            image = image.resize(to, Image.Resampling(self.resample))
        left, top = (to[0] - self.size) // 2, (to[1] - self.size) // 2
        return np.array(image.crop((left, top, left + self.size, top + self.size)))

    def reduced(self, pixels_HWC: np.ndarray, share: float) -> np.ndarray:
        """A picture no more than twice as large as this share of its area must be: to change a camera's millions of
        pixels, of which few are left, takes ten times as long as to read them.

        Args:
            pixels_HWC: uint8 [H, W, 3].
            share: Smallest part that is cut from it, by area.
        """
        factor = int(min(pixels_HWC.shape[:2]) * share**0.5 / self.edge)
        return np.array(Image.fromarray(pixels_HWC).reduce(factor)) if factor > 1 else pixels_HWC

    def normalise(self, pixels_BHWC: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Pixels as the model reads them: float32 [B, C, H, W]. Floats are taken as 0 to 1 already.

        Colours stay beside each other in memory (channels last), which makes a ResNet's step a third shorter on a CPU.
        """
        pixels = torch.as_tensor(pixels_BHWC)
        scale = 1 / 255 if pixels.dtype == torch.uint8 else 1.0
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels.permute(0, 3, 1, 2).float() * (scale / std).view(-1, 1, 1)).sub_((mean / std).view(-1, 1, 1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it as Transformers' image processors read it."""
        side = {"height": self.edge, "width": self.edge} if self.squash else {"shortest_edge": self.edge}
        about = {
            "image_processor_type": "ViTImageProcessor"
            if self.squash and self.edge == self.size
            else "BitImageProcessor",
            "do_resize": True,
            "size": side,
            "resample": self.resample,
            "do_center_crop": self.edge != self.size or not self.squash,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (Path(folder) / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _middle(pixels_HWC: np.ndarray) -> np.ndarray:
    """The picture, or of a strip its middle part."""
    height, width = pixels_HWC.shape[:2]
    most = STRIP * min(height, width)
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return pixels_HWC[top : top + most, left : left + most]


def _whole(side: float) -> int:
    """As Transformers rounds it, but for what a float lacks of a whole number."""
    return int(side + 1e-6)


def find(config: ModelConfig, size: int | None) -> ImageReader:
    """The reader of a checkpoint, for pictures of another size where one is given.

    Raises:
        UserError: The checkpoint cannot be found, or says nothing that can be used.
    """
    given = config.shape.get("image_size")
    if config.weights == "random" and config.shape:
        return _sized(ImageReader(config.name, given or USUAL, given or USUAL), size)
    folder = find_folder(config)
    if folder and not (folder / FILE).is_file():
        side = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("image_size")
        side = side if isinstance(side, int) else USUAL
        note = f"{config.name} has no {FILE}: pictures are scaled to {side} pixels and by ImageNet's mean and deviation"
        return _sized(ImageReader(config.name, side, side, notes=(note,)), size)
    from transformers import AutoImageProcessor

    with plain_errors(config), quiet():  # it knows what older files leave to the class that they name
        processor = AutoImageProcessor.from_pretrained(folder or config.name, backend="pil", **where(config, folder))
    return _sized(parse(config.name, processor.to_dict()), size)


def parse(name: str, about: dict[str, Any]) -> ImageReader:
    """The reader that does what an image processor does.

    Args:
        name: Of the checkpoint.
        about: What Transformers' processor says of itself, with every default in its place.

    Raises:
        UserError: The result is no square, or has an edge of no picture.
    """
    size, cut = about["size"], about.get("crop_size")
    squash = "shortest_edge" not in size
    edge = size.get("shortest_edge", size.get("height"))
    if not isinstance(edge, int) or size.get("width", edge) != edge or (cut and cut["height"] != cut["width"]):
        raise UserError(Mistake(f"pictures of {name} have size {size}, cut to {cut}; only squares are read here"))
    side = edge
    if about.get("crop_pct") and not squash:
        side, edge = edge, edge if edge >= CONVNEXT_CROPS else int(edge / about["crop_pct"])
        squash = side >= CONVNEXT_CROPS
    if cut and about.get("do_center_crop"):
        side = cut["height"]
    if side > edge:
        raise UserError(Mistake(f"pictures of {name} are scaled to {edge} pixels and cut to {side}, which is more"))
    mean, std = _colours(about)
    return ImageReader(name, side, edge, squash, mean, std, int(about["resample"]))


def _colours(about: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels from 0 to 1, whatever range the processor makes of them first."""
    top = 255 * about["rescale_factor"] if about.get("do_rescale") else 255.0
    top = round(top, 9)  # 255 times the float next to 1/255
    mean, std = (about["image_mean"], about["image_std"]) if about.get("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    return tuple(value / top for value in mean), tuple(value / top for value in std)


def _sized(reader: ImageReader, size: int | None) -> ImageReader:
    """The same view of a picture in another number of pixels."""
    return replace(reader, size=size, edge=round(reader.edge * size / reader.size)) if size else reader
