"""What a method found before the first step, as two files in the run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from peftcli.artifacts import atomic
from peftcli.config.errors import CheckFailed

PLAIN, TENSORS = "found.json", "found.safetensors"


@dataclass(frozen=True)
class FoundFolder:
    """A folder for it, which is there whole or not at all."""

    path: Path

    def read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """See `peftcli.methods.contract.Found`.

        Raises:
            CheckFailed: `broken-checkpoint`.
        """
        if not self.path.is_dir():
            return None
        try:
            return json.loads((self.path / PLAIN).read_text(encoding="utf-8")), load_file(self.path / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            hint = "remove the folder and the checkpoints beside it, and resume: the run begins anew"
            raise CheckFailed("broken-checkpoint", f"{self.path} cannot be read: {error}", hint) from error

    def write(self, plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """See `peftcli.methods.contract.Found`. Raises as `atomic.folder` does."""
        with atomic.folder(self.path) as partial:
            atomic.write_json(partial / PLAIN, plain)
            atomic.write_tensors(partial / TENSORS, {n: t.cpu().contiguous() for n, t in tensors.items()})
