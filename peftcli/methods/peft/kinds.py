"""What PEFT's tuners can do, where it is not what most can: merge, unload, start as the base, live two on one base.

Seen on LLaMA with PEFT 0.21.2 and each tuner's own default initialisation; the contract tests hold some of them to it.
"""

from __future__ import annotations

from dataclasses import replace

from peftcli.methods.contract import Capabilities

LINEAR = Capabilities()
BESIDE = replace(LINEAR, merges=False, unloads=False)
"""Nothing of the base is wrapped: virtual tokens or extra attention beside it."""
PROMPT = replace(BESIDE, identity_at_start=False)
CACHE = replace(PROMPT, recomputes=False)
"""The prefix enters through the key-value cache, which Transformers drops under gradient checkpointing."""
FROM_NOISE = replace(LINEAR, identity_at_start=False)

CAPABILITIES: dict[str, Capabilities] = {
    "ADALORA": replace(LINEAR, several_adapters=False),
    "ADAPTION_PROMPT": BESIDE,
    "BEFT": replace(LINEAR, merges=False),
    "C3A": FROM_NOISE,
    "CARTRIDGE": CACHE,
    "FOURIERFT": FROM_NOISE,
    "LILY": replace(LINEAR, merges=False),
    "PREFIX_TUNING": CACHE,
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": PROMPT,
    "UNILORA": FROM_NOISE,
    "VBLORA": FROM_NOISE,
}

UNFIT: dict[str, str] = {
    "CPT": "its loss needs the kind of every token, which no task here gives",
    "MULTITASK_PROMPT_TUNING": "it needs a task number with every row, which no task here gives",
    "POLY": "it needs a task number with every row, which no task here gives",
    "SHADOW": "it passes an object of its own to the output layer in place of hidden states",
    "XLORA": "it mixes LoRA adapters that are already trained, which a recipe cannot name",
}
"""PEFT's tuners that this loop cannot train, and why."""

NEED_EMBEDDINGS = frozenset({"PROMPT_TUNING", "P_TUNING"})
"""Tuners that feed embeddings instead of tokens, so that a classification head cannot tell where a padded row ends."""

DATA_DRIVEN = frozenset({"eva", "corda", "loftq", "lora_ga"})
"""Values of LoRA's `init_lora_weights` that need data, gradients or a quantised base before the adapter goes in."""
