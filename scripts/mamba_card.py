"""The model card of a Mamba that scripts/pretrain_mamba.py trained, written from its log."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
from wordnet import copy_licence

CARD = """---
license: other
license_name: wordnet-3.0
license_link: LICENSE
language: en
library_name: transformers
pipeline_tag: text-generation
---

# mamba-wordnet

A small Mamba language model, pre-trained from random weights on the glosses of WordNet 3.0: real weights to try
fine-tuning on where no model hub can be reached. It writes in the style of a dictionary, `word: definition; "example"`,
and knows nothing else.

| | |
| --- | --- |
| parameters | {parameters:,} (embedding tied, {embedding:,} of them) |
| shape | {layers} layers, width {width}, {inner} channels, {states} states, rank of the step size {rank} |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, trained on the same text; `<|endoftext|>` ends and pads |
| data | {documents:,} documents, one a synset, {epoch:,} tokens |
| training | {steps:,} steps, {tokens:,} tokens ({epochs:.1f} epochs), {precision}, {seconds} on {machine} |
| optimiser | AdamW (0.9, 0.95), decay of matrices {decay:g}, gradients clipped at {clip:g} |
| schedule | rate {rate:g}, {warmup} steps of warm-up, a cosine to 0; batches of {batch:,} tokens; seed {seed} |
| held-out loss | {loss:.3f} nats a token, {bits:.3f} bits a byte, on {held_out:,} synsets |
| date | {date} |

**Held out.** All synsets of the bundled data set `wordnet-categories`, its train split too, and every synset with a
definition equal to one of theirs up to case and punctuation; likewise the {held_out:,} synsets that the loss is
measured on. No category name was in the text. Each document starts from an empty state, as a prompt does; its first
token is not predicted, so neither loss counts it.

**How.** `python scripts/pretrain_mamba.py`; `log.jsonl` holds steps, tokens, losses and seconds as they came, in its
last line what these very files measure when they are read back. Matrices are stored in bfloat16; A_log, D, norms and
biases in float32, and everything is read as float32.

**Limits.** A toy: English definitions only, with the slants of those who wrote them. What it writes is often wrong.
Made to test and compare fine-tuning methods; do not deploy it.

**Licence.** Trained on WordNet 3.0, Copyright 2006 by Princeton University, whose notice is in `LICENSE`; the weights
may be used, changed and passed on with it.
"""


def write_card(
    out: Path, model: torch.nn.Module, plan: dict[str, Any], log: list[dict[str, Any]], documents: tuple[int, int, int]
) -> None:
    """README.md and LICENSE.

    Args:
        out: Where the model is.
        model: The model, for its shape.
        plan: How it was trained, the fields of `Plan`.
        log: Its log; the last line has the held-out loss.
        documents: Documents trained on, those held out, tokens of the first.
    """
    config, last = model.config, log[-1]
    trained, held_out, epoch = documents
    about = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "embedding": model.get_input_embeddings().weight.numel(),
        "layers": config.num_hidden_layers, "width": config.hidden_size, "inner": config.intermediate_size,
        "states": config.state_size, "rank": config.time_step_rank, "vocabulary": config.vocab_size,
        "documents": trained, "held_out": held_out, "epoch": epoch, "steps": last["step"], "tokens": last["tokens"],
        "epochs": last["tokens"] / epoch, "precision": "bfloat16 autocast" if plan["bf16"] else "float32",
        "seconds": f"{last['seconds'] / 60:.0f} minutes",
        "machine": f"{_threads(plan['threads'])} of a CPU ({platform.system()} {platform.machine()})",
        "rate": plan["rate"], "warmup": plan["warmup"], "decay": plan["decay"], "clip": plan["clip"],
        "batch": plan["tokens"], "seed": plan["seed"], "loss": last["held_out_loss"], "bits": last["bits_per_byte"],
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    (out / "README.md").write_text(CARD.format(**about), encoding="utf-8")
    copy_licence(out)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
