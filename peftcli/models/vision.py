"""What loading a vision model takes beside its weights: positions for pictures of another size, a head for new labels.

D width, N patches and special tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.config.errors import Mistake, UserError

NAMED = 3
"""Former labels that a note names."""


@torch.no_grad()
def resize_positions(model: Any, size: int) -> None:
    """Make a transformer read pictures of `size` pixels a side: its positions interpolated once, as its own forward
    pass would do for each batch. Nothing happens to a model without positions, or of that size already.

    Raises:
        UserError: `size` is no multiple of the patch size.
    """
    places: Any = getattr(model.base_model, "embeddings", None)
    if not hasattr(places, "interpolate_pos_encoding"):
        return
    patches = places.patch_embeddings
    side = patches.patch_size[0]
    if size % side:
        near = sorted({max(side, size // side * side), (size // side + 1) * side})
        what = f"task.image_size={size} is no multiple of the model's patches of {side} pixels"
        raise UserError(Mistake(what, "task.image_size", tuple(map(str, near))))
    before_1ND = places.position_embeddings
    special = before_1ND.shape[1] - patches.num_patches
    patches_new = (size // side) ** 2
    if patches_new != patches.num_patches:
        places.position_embeddings = nn.Parameter(before_1ND.float(), requires_grad=False)
        there_1ND = before_1ND.new_zeros(1, patches_new + special, before_1ND.shape[2])
        after_1ND = places.interpolate_pos_encoding(there_1ND, size, size)
        places.position_embeddings = nn.Parameter(after_1ND.to(before_1ND.dtype), requires_grad=False)
    patches.image_size, patches.num_patches = (size, size), patches_new
    if hasattr(places, "image_size"):
        places.image_size = (size, size)
    model.config.image_size = size


def new_head(model: Any, former: dict[int, str] | None, labels: list[str]) -> str:
    """Draw the head anew where the checkpoint's own answers with other labels; a new one is marked `head_is_drawn`.

    Args:
        model: As it was loaded, with a head for `labels`.
        former: The labels of the checkpoint's head; None where it brought none, and one was drawn already.
        labels: What it shall learn.

    Returns:
        What was done, for the user; empty where there was no head, or it has these labels in this order.
    """
    model.head_is_drawn = former is None or list(former.values()) != labels
    if former is None or not model.head_is_drawn:
        return ""
    head = model.score if hasattr(model, "score") else model.classifier
    for linear in [module for module in head.modules() if isinstance(module, nn.Linear)]:
        nn.init.normal_(linear.weight, std=getattr(model.config, "initializer_range", 0.02))
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    named = ", ".join([*list(former.values())[:NAMED], "..."] if len(former) > NAMED else former.values())
    return f"the checkpoint's head answers with {len(former)} other labels ({named}): a new one is drawn for these rows"
