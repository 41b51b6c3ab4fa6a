"""The real SmolLM2 through the same door: what it knows survives loading and an adapter that has learnt nothing."""

from __future__ import annotations

import pytest
import torch

from peftcli.config.schema import ModelConfig
from peftcli.models import loading
from peftcli.testing.rows import trained


@pytest.mark.samples
def test_smollm2_with_lora_still_knows_its_capitals() -> None:
    from peftcli.methods.lora.settings import Settings
    from peftcli.methods.lora.tuner import Method

    loaded = loading.load(ModelConfig(name="smollm2-135m", source="sample"), "bf16", "causal-lm", None)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt")
    plain = loaded.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(plain[0])
    adapted = Method(Settings()).attach(loaded.model, loaded.family)
    assert sum(p.numel() for p in trained(adapted).values()) == 460_800
    assert torch.equal(adapted.generate(**prompt, max_new_tokens=4, do_sample=False), plain)
