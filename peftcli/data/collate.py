"""Encoded rows to tensors. B rows of a batch, L tokens of its longest row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of a position that is not supervised."""
MULTIPLE = 8
"""What batches for a model are padded to a multiple of. Each new shape costs a CPU the building of its kernels and the
memory to keep them: 60 steps of 4 rows of SmolLM2 took 1.47 GB instead of 1.87 GB; GPUs want multiples of 8 too."""


def pad(rows: list[dict[str, Any]], pad_id: int, side: str = "right", multiple: int = 1) -> dict[str, torch.Tensor]:
    """Pad rows to the longest of them.

    Args:
        rows: Encoded rows with `input_ids` and `labels` of equal length; other whole numbers are passed on.
        pad_id: Token that fills up `input_ids`.
        side: Where it goes: `right` to train, `left` to generate.
        multiple: L is rounded up to a multiple of this: fewer different shapes mean fewer kernels to build and keep.

    Returns:
        `input_ids`, `attention_mask` and `labels`, int64 [B, L], and any other whole number as int64 [B]. Without
        `labels` in the rows there are none in the batch; a single `labels` number a row is [B].

    Raises:
        ValueError: A row has another number of labels than of tokens.
    """
    import torch

    longest = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple

    def filled(name: str, value: int) -> torch.Tensor:
        out_BL = torch.full((len(rows), longest), value, dtype=torch.long)
        for i, row in enumerate(rows):
            values = row[name]
            if len(values) != len(row["input_ids"]):
                raise ValueError(f"row {i} has {len(row['input_ids'])} tokens and {len(values)} {name}")
            start = longest - len(values) if side == "left" else 0
            out_BL[i, start : start + len(values)] = torch.tensor(values, dtype=torch.long)
        return out_BL

    batch = {"input_ids": filled("input_ids", pad_id)}
    lengths_B = torch.tensor([len(row["input_ids"]) for row in rows])
    place_L = torch.arange(longest)
    if side == "left":
        place_L = longest - 1 - place_L
    batch["attention_mask"] = (place_L < lengths_B[:, None]).long()
    for name, value in rows[0].items():
        if name == "labels" and isinstance(value, list):
            batch[name] = filled(name, IGNORE)
        elif isinstance(value, int):
            batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.long)
    return batch
