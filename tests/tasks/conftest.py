"""A tokenizer and a language model small enough for a test, made on the spot."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from peftcli.data.rows import Rows

SENTENCES = [
    "Question: how many apples are left? Answer: three apples",
    "The film was good, the music was bad. Sentiment: good",
    "A stupid plot and a wonderful cast. Topic: film",
    "user assistant system",
]
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(chat: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few sentences; any text can be written in it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    inner.train_from_iterator(SENTENCES, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    made.chat_template = chat
    return made


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=None)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))


def build_llama(vocabulary: int, labels: int | None = None, dtype: torch.dtype = torch.float64):
    """A Llama of two layers with random weights, dropout off; with a head for `labels` classes where given."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        use_cache=False,
        **({"num_labels": labels} if labels else {}),
    )
    torch.manual_seed(0)
    kind = LlamaForSequenceClassification if labels else LlamaForCausalLM
    return kind(config).to(dtype).eval()


@pytest.fixture
def llama(tokenizer):
    return build_llama(len(tokenizer))


@pytest.fixture
def make_llama(tokenizer):
    """`build_llama` for the tokenizer's vocabulary."""
    return partial(build_llama, len(tokenizer))


def build_splits(train: list[dict], validation: list[dict] | None = None, test: list[dict] | None = None):
    """Rows as the data room gives them."""

    def numbered(rows):
        return None if rows is None else Rows.from_list([{"row": i, **row} for i, row in enumerate(rows)])

    return SimpleNamespace(train=numbered(train), validation=numbered(validation), test=numbered(test))


@pytest.fixture(name="splits")
def splits_fixture():
    return build_splits
