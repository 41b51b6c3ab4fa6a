"""WordNet's glosses as text to pre-train on: documents, tokenizer, batches. What is evaluated on is held out.

A document is a synset: `word: gloss`, examples in it, and the end-of-text token. Batches hold documents of like length,
each from its own start: that is how the model is used later, and little is padding. R rows of a batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from build_wordnet_categories import OUT as CATEGORIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from wordnet import SPLITS, by_hash, rows, words

END = "<|endoftext|>"
VOCABULARY = 4096
LONGEST = 128
"""Tokens of a document; what is longer is cut."""
POOL = 4096
"""Documents that are sorted by length together."""
HELD_OUT = 1_500
"""Synsets for the held-out loss, beyond those of wordnet-categories."""
IGNORED = -100


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and those that the loss is measured on."""

    train: list[str]
    held_out: list[str]


def corpus() -> Corpus:
    """Every synset but those of wordnet-categories, cut in two; a definition that is held out is in neither again."""
    shut: set[str] = set()
    for split in SPLITS:
        table = pq.read_table(CATEGORIES / f"{split}.parquet")
        shut |= set(table["synset"].to_pylist()) | set(map(words, table["text"].to_pylist()))
    left = [row for row in sorted(rows(), key=by_hash) if shut.isdisjoint((row["synset"], words(row["definition"])))]
    held_out, rest = left[:HELD_OUT], left[HELD_OUT:]
    shut = {words(row["definition"]) for row in held_out}
    train = [row for row in rest if words(row["definition"]) not in shut]
    return Corpus([document(row) for row in train], [document(row) for row in held_out])


def document(row: dict[str, str]) -> str:
    """A synset as text; its category is not in it."""
    return f"{row['word']}: {row['gloss']}"


def train_tokenizer(texts: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, so there is no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Token ids of each document, its end included, at most `LONGEST`."""
    encoded = tokenizer([text + END for text in texts], truncation=True, max_length=LONGEST)["input_ids"]
    return [np.array(ids, dtype=np.int64) for ids in encoded]


def predicted_bytes(documents: list[np.ndarray], tokenizer: PreTrainedTokenizerFast) -> int:
    """Bytes of UTF-8 of all tokens that are predicted: all but each document's first and its end."""
    texts = tokenizer.batch_decode([ids[1:] for ids in documents], skip_special_tokens=True)
    return sum(len(text.encode()) for text in texts)


def pad(documents: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels [R, L]; the end-of-text token pads, and padding is not predicted."""
    longest = max(map(len, documents))
    inputs_RL = np.zeros((len(documents), longest), dtype=np.int64)
    labels_RL = np.full_like(inputs_RL, IGNORED)
    for row, ids in enumerate(documents):
        inputs_RL[row, : len(ids)] = labels_RL[row, : len(ids)] = ids
    return torch.from_numpy(inputs_RL), torch.from_numpy(labels_RL)


def batches(lengths: np.ndarray, tokens: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of document numbers, each document once an epoch.

    Args:
        lengths: Tokens of each document.
        tokens: Tokens of a batch, padding included; fewer at the end of a pool.
        seed: Decides the order, together with the epoch.
    """
    epoch = 0
    while True:
        chance = np.random.default_rng([seed, epoch])
        order = chance.permutation(len(lengths))
        pools = [order[start : start + POOL] for start in range(0, len(order), POOL)]
        cut = [
            batch for pool in pools for batch in _cut(pool[np.argsort(lengths[pool], kind="stable")], lengths, tokens)
        ]
        for place in chance.permutation(len(cut)):
            yield cut[place]
        epoch += 1


def _cut(ordered: np.ndarray, lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Cut documents that grow in length where rows x longest would pass the budget."""
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or (end + 1 - start) * lengths[ordered[end]] > tokens:
            yield ordered[start:end]
            start = end
