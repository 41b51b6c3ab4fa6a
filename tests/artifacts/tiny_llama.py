"""A tiny Llama and a trained-looking LoRA on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from peftcli.artifacts import lineage
from peftcli.config.schema import ClassificationConfig, DataConfig, ModelConfig, RunConfig
from peftcli.testing.tiny import llama_shape


@dataclass
class LoraSettings:
    """Stands for a method's settings."""

    name: str = "lora"


def run_config(output: Path | str = "runs", **more) -> RunConfig:
    model, data = ModelConfig("tiny"), DataConfig("files", files={"train": "a.jsonl"})
    return RunConfig(model, data, LoraSettings(), ClassificationConfig(), output=str(output), **more)


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = llama_shape(initializer_range=0.02)
    config._name_or_path = "/home/somebody/models/tiny"
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def adapted(base: LlamaForCausalLM, scale: float = 0.1, **settings) -> PeftModel:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | settings
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def lineage_of(model: PeftModel) -> dict:
    return lineage.collect(
        model, run_config(), base_id="/home/somebody/models/tiny", revision="abc", data_fingerprint="f00d"
    )
