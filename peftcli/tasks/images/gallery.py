"""A split of pictures, ready to be put into batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from peftcli.config.errors import Mistake
from peftcli.data.images import places
from peftcli.data.images.decode import Animated
from peftcli.data.images.prepared import prepare
from peftcli.data.rows import Rows
from peftcli.models.image_reader import ImageReader
from peftcli.tasks.contract import Encoded


@dataclass(frozen=True)
class Gallery(Encoded):
    """Rows with their pictures beside them.

    Attributes:
        pixels_NSSC: The pictures as the model's reader cut them, uint8 [N, S, S, 3], of all rows of the source; None
            where there are too many to keep.
        pictures: The pictures themselves, as the source has them.
        originals: Give them with the rows even where pixels are kept: training cuts from them.
        hidden: What the model's frozen beginning makes of each row, in place of pictures, [N, *].
    """

    pixels_NSSC: np.ndarray | None = None
    pictures: Rows | None = None
    originals: bool = False
    hidden: Tensor | None = None

    def take(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows at these positions, with `pixels` (uint8 [S, S, 3] or None) and, where asked for, `picture`; or with
        `hidden` alone."""
        chosen = list(indices)
        rows = self.rows.take(chosen)
        if self.hidden is not None:
            return [{**row, "hidden": self.hidden[at]} for row, at in zip(rows, chosen, strict=True)]
        assert self.pictures is not None
        for row, at in zip(rows, chosen if self.kept is None else [self.kept[one] for one in chosen], strict=True):
            row["pixels"] = None if self.pixels_NSSC is None else self.pixels_NSSC[at]
            if self.originals or self.pixels_NSSC is None:
                row["picture"] = self.pictures[at][places.COLUMN]
        return rows


def hang(
    rows: Rows, encoded: list[dict[str, Any]], reader: ImageReader, originals: bool, animated: Animated = "error"
) -> Gallery:
    """Decode a split's pictures, or read them from the cache, and put the rows beside them that can be used.

    Args:
        rows: The source's.
        encoded: The same, each `row`, `name` and `labels`.
        reader: The model's.
        originals: Training cuts from the pictures themselves.
        animated: As `decode.look`.
    """
    found = prepare(rows, reader.fit, reader.size, reader.fingerprint, animated)
    kept = [place for place in range(len(rows)) if place not in found.problems]
    bad = [Mistake(f"picture is {problem}", _where(rows, place)) for place, problem in sorted(found.problems.items())]
    counts = {"rows": len(kept), "dropped": len(bad), "truncated": 0, **found.oddities}
    pictures = Rows(rows.table.select([places.COLUMN]))
    return Gallery(
        Rows.from_list([encoded[place] for place in kept]) if kept else Rows.from_list([]), [1] * len(kept), counts,
        bad, kept, found.pixels_NSSC, pictures, originals,
    )  # fmt: skip


def _where(rows: Rows, place: int) -> str:
    row = rows[place]
    picture = row[places.COLUMN]
    return picture.get("file") or f"row {row['row']}" + (f" ({picture['path']})" if picture.get("path") else "")
