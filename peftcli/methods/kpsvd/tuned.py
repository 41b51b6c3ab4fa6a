"""What a full fine-tuning changed: the weights of its checkpoint less those of the base."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftcli.config.errors import Mistake, UserError, nearest
from peftcli.methods.gradients import Weights
from peftcli.models.checkpoint import check_weights


def changes(folder: str, weights: Weights) -> dict[str, Tensor]:
    """The differences, in float32 (float64 where the weights are).

    Args:
        folder: Of a checkpoint of the same architecture in safetensors.
        weights: The base's.

    Raises:
        UserError: There is no such folder, a tensor is missing, cannot be read or has another shape.
        CheckFailed: `unsafe-weights`: it has pickled weights only.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(Mistake(f"method.tuned={folder!r} is no folder"))
    check_weights(place)
    files: dict[str, Path] = {}
    for path in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as stored:
                files |= dict.fromkeys(stored.keys(), path)
        except SafetensorError as error:
            raise UserError(Mistake(f"{path} cannot be read: {error}")) from error
    return {name: _change(f"{name}.weight", weight, files, folder) for name, weight in weights.items()}


def _change(key: str, weight: Tensor, files: dict[str, Path], folder: str) -> Tensor:
    if key not in files:
        what = f"method.tuned={folder!r} has no tensor {key}"
        raise UserError(Mistake(what, nearest=nearest(key, files)))
    with safe_open(files[key], framework="pt") as stored:
        after = stored.get_tensor(key)
    if after.shape != weight.shape:
        what = f"{key} is {list(after.shape)} in method.tuned={folder!r}, and {list(weight.shape)} in the base"
        raise UserError(Mistake(what))
    wide = torch.promote_types(weight.dtype, torch.float32)
    return after.to(weight.device, wide) - weight.detach().to(wide)
