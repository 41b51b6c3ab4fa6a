"""What Transformers lacks for Mamba: a classification head, and state parameters that stay float32.

Shapes: B rows, L tokens, E width of the model, C classes, D channels, N states.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, MambaConfig, MambaModel, MambaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.mamba.modeling_mamba import MambaMixer

from peftcli.models.features import RunningMean

EXACT = ("mixer.A_log", "mixer.D")
"""Ends of the names of tensors that are float32 in every model: A = -exp(A_log) turns the rounding of bfloat16's eight
bits, up to 1 % of A, into another decay at every step."""


@cache
def fill() -> None:
    """Tell Transformers' own loading about both, once in a process."""
    MambaPreTrainedModel._supports_sdpa = True  # there is no attention, so the usual kernel for it is no reason to stop
    MambaPreTrainedModel._keep_in_fp32_modules_strict = set(EXACT)
    AutoModelForSequenceClassification.register(MambaConfig, MambaForSequenceClassification, exist_ok=True)


@torch.no_grad()
def draw_exactly(model: nn.Module) -> None:
    """Write the state parameters of random weights in float32; built in half precision they were rounded.

    `A_log` starts as log(1), ..., log(N) in each channel (S4D-real), `D` as ones.
    """
    for mixer in model.modules():
        if isinstance(mixer, MambaMixer) and mixer.A_log.dtype in (torch.bfloat16, torch.float16):
            states_N = torch.arange(1, mixer.ssm_state_size + 1, dtype=torch.float32, device=mixer.A_log.device)
            mixer.A_log.data = states_N.log().expand(mixer.A_log.shape).contiguous()
            mixer.D.data = torch.ones_like(mixer.D, dtype=torch.float32)


class MambaForSequenceClassification(MambaPreTrainedModel):
    """A linear head on the state of each row's last token."""

    def __init__(self, config: MambaConfig):
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.score = nn.Linear(config.hidden_size, len(config.id2label or {}), bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.backbone.embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Scores [B, C] of the classes.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], nonzero at tokens, padded on either side; without it each position is a token.
            inputs_embeds: [B, L, E] in place of `input_ids`.
            kwargs: More for the backbone.
        """
        hidden_BLE = self.backbone(
            input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False, **kwargs
        )[0]
        headless = isinstance(self.score, RunningMean)
        hidden_BLE = self.score(hidden_BLE) if headless else hidden_BLE
        rows, length = hidden_BLE.shape[:2]
        at_L = torch.arange(length, device=hidden_BLE.device)
        at_BL = at_L.expand(rows, length) if attention_mask is None else at_L * (attention_mask != 0)
        last_BE = hidden_BLE[torch.arange(rows, device=hidden_BLE.device), at_BL.argmax(1)]
        if headless:
            return SequenceClassifierOutput(logits=last_BE)
        # Residuals are float32 in a half-precision model, and so is what the last norm gives.
        return SequenceClassifierOutput(logits=self.score(last_BE.to(self.score.weight.dtype)))
