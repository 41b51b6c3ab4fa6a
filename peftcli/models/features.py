"""A model without a head: what stands in the place of its class scores are its pooled features.

B rows, L tokens, D width. Vision models of Transformers have this of their own where there are no classes: the state of
the class token (ViT), that beside the mean over patches (DINOv2), the mean over places (ResNet). Language models get
the mean over a row's tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class RunningMean(nn.Module):
    """The mean of each position and all before it; at a row's last token, the mean over its tokens."""

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Means [B, L, D], in the type of the input, of rows that are padded on the right alone."""
        count_L = torch.arange(1, hidden_BLD.shape[1] + 1, device=hidden_BLD.device)
        kind = torch.promote_types(hidden_BLD.dtype, torch.float32)
        return (hidden_BLD.cumsum(1, dtype=kind) / count_L[:, None]).to(hidden_BLD.dtype)


def take_off_head(model: Any) -> None:
    """Put the mean over tokens in the place of a language model's head; vision models are without one already."""
    if hasattr(model, "score"):
        model.score = RunningMean()


class Headless(nn.Module):
    """A language model of Transformers that never had a head, asked like one whose head was taken off.

    Args:
        model: With `last_hidden_state` in its answer.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """`logits`, the mean over each row's tokens [B, D], float32; from ids and mask [B, L]."""
        hidden_BLD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask_BL1 = attention_mask[..., None].float()
        return SimpleNamespace(logits=(hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1))


def width(model: Any) -> int:
    """How many numbers the features of a model without a head are."""
    shape = model.config
    if hasattr(shape, "hidden_sizes"):
        return shape.hidden_sizes[-1]
    return shape.hidden_size * (2 if shape.model_type.startswith("dinov2") else 1)
