"""A tokenizer and language models small enough for a test, made on the spot."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from peftcli.testing.tiny import llama_shape

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


def build_llama(vocabulary: int, labels: int | None = None, dtype: torch.dtype = torch.float64, **changes):
    """A LLaMA of two layers with random weights, in evaluation mode; `labels` give it a classification head."""
    usual = {"max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2}
    config = llama_shape(vocab_size=vocabulary, **{**usual, **changes})
    if labels:
        config.num_labels = labels
    torch.manual_seed(0)
    kind = LlamaForSequenceClassification if labels else LlamaForCausalLM
    return kind(config).to(dtype).eval()
