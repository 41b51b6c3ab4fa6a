"""One token a byte, for a rehearsal with random weights where no vocabulary is on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "bytes"
END = "<|endoftext|>"
TOKENS = 257
"""256 bytes and the end token, which also pads."""


def build() -> PreTrainedTokenizerBase:
    """Any text in UTF-8, byte by byte as tokens 1 to 256; token 0 ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([END, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, name_or_path=NAME)
