"""Answers a token at a time: greedily, by beams, or drawn. B sequences of a batch, L tokens, V words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from peftcli.config import schema
from peftcli.tasks.inference import to_batch
from peftcli.tasks.tokens import pad_id


def decode(
    model: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    device: Any,
    config: schema.GenerationConfig,
    stops: list[int],
    seeds: list[int],
) -> list[str]:
    """A text after each prompt, up to an end token, without special tokens.

    Args:
        model: A causal language model inside `measuring`.
        prompts: Token ids; padded on the left, so that all answers start at the same position.
        tokenizer: The model's.
        device: Where the model is.
        config: `max_new_tokens`, `beams`, and where `samples` is above 1, `temperature` and `top_p`.
        stops: End tokens, beside those that the checkpoint names.
        seeds: One a prompt; read where texts are drawn. A text depends on its own prompt and seed, not on the others.
    """
    batch = to_batch([{"input_ids": ids} for ids in prompts], tokenizer, device, "left")
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*stops, *(named if isinstance(named, list) else [named])} - {None}
    settings = GenerationConfig(
        do_sample=False,
        num_beams=config.beams,
        max_new_tokens=config.max_new_tokens,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id(tokenizer),
    )
    drawn = [TemperatureLogitsWarper(config.temperature), TopPLogitsWarper(config.top_p), Chance(seeds)]
    with _nothing_inherited(model):
        out_BL = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=settings,
            logits_processor=LogitsProcessorList(drawn if config.samples > 1 else []),
        )
    return tokenizer.batch_decode(out_BL[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def _nothing_inherited(model: Any) -> Iterator[None]:
    """Take the checkpoint's own settings away: Transformers fills what ours leave unset, as a repetition penalty.

    Most of them are neutral only as None, which counts as unset, so that ours cannot overrule them.
    """
    shared = vars(model.generation_config)  # changed in place: an adapter's wrapper and its base hold the same object
    own = dict(shared)
    shared.clear()
    shared.update(vars(GenerationConfig()))
    try:
        yield
    finally:
        shared.clear()
        shared.update(own)


class Chance(LogitsProcessor):
    """Noise on the scores, after which the greatest of them is a word drawn by its probability (Gumbel 1954).

    Unlike `torch.multinomial` it gives each sequence a generator of its own.
    """

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] minus the logarithm of exponential noise."""
        words = scores.shape[1]
        noise_BV = torch.stack([torch.empty(words).exponential_(generator=one) for one in self.generators])
        return scores - noise_BV.log_().to(scores)


def seed_of(*parts: int) -> int:
    """A seed for a row's sample, out of the run's seed, the row and the sample's number."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
