"""What the untouched base makes of every row, kept: methods that look at it need not compute it for each task anew.

N rows, D features. Rows are taken in their order and in equal parts, so that a resumed run has the same bits; they
are kept on disk by the contents of base and rows, for the next run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcli.config import paths
from peftcli.tasks.contract import Encoded

LOG = logging.getLogger(__name__)
MOST_ROWS = 200_000
"""More are not worth the wait before the first step."""
AT_ONCE = 64
NAME = "features"


def features(
    model: Any,
    rows: Encoded,
    inputs: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
    about: str,
    heed: Callable[[], None] = lambda: None,
) -> Tensor | None:
    """The features of all rows [N, D], or None where there are too many.

    Args:
        model: With `base_features`.
        rows: The encoded rows.
        inputs: From rows to the model's inputs.
        about: What the rows hold, and how they are read.
        heed: Called between parts; what it raises ends the work, and nothing of it is kept.
    """
    if len(rows) > MOST_ROWS:
        return None
    base = model.get_base_model()
    device = next(base.parameters()).device
    place = paths.cache() / NAME / f"{_key(base, about)}.safetensors"
    if (found := _read(place)) is None:
        parts = []
        for start in range(0, len(rows), AT_ONCE):
            heed()
            batch = inputs(rows.take(range(start, min(start + AT_ONCE, len(rows)))))
            parts.append(model.base_features({name: value.to(device) for name, value in batch.items()}).cpu())
        found = torch.cat(parts)
        _write(place, found)
    return found.to(device)


def _key(base: Any, about: str) -> str:
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else ""
    digest = hashlib.sha256(f"{about} {kind} {type(base).__name__} {torch.__version__}".encode())
    for name, tensor in sorted(base.state_dict().items()):
        if not name.startswith("smat."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(place: Path) -> Tensor | None:
    try:
        return load_file(place)[NAME]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        LOG.warning("%s is damaged and is made anew: %s", place, error)
        return None


def _write(place: Path, found: Tensor) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=place.parent, suffix=".unfinished")
        os.close(handle)
        save_file({NAME: found}, unfinished)
        os.replace(unfinished, place)
    except OSError as error:
        LOG.warning("the base's features are not kept for the next run: %s", error)
