"""Text to tokens such that training and decoding cut it at the same places, and texts that are too long."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peftcli.config.errors import Mistake, UserError

CONTEXT = 40
"""Characters of the prompt's end that decide how a continuation is cut into tokens."""


def pad_id(tokenizer: Any) -> int:
    """The token that fills up a batch. The attention mask hides it, so the end token will do where there is none."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return found if found is not None else 0


@dataclass(frozen=True)
class Tokens:
    """A tokenizer seen as prompt and continuation."""

    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        """The text's tokens and nothing else."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before a text; what it puts after one would stand between prompt and answer."""
        body = self.ids("a")
        whole = self.tokenizer("a")["input_ids"]
        for at in range(len(whole) - len(body) + 1):
            if whole[at : at + len(body)] == body:
                return whole[:at]
        return []

    @cached_property
    def end(self) -> int:
        """The token that ends an answer.

        Raises:
            UserError: The tokenizer names none.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(Mistake("the tokenizer has no end token (eos_token)", where="model.name"))
        return self.tokenizer.eos_token_id

    def continuation(self, prompt: str, text: str) -> list[int]:
        """The tokens of `text` as it follows `prompt`, where the prompt keeps the tokens it has alone.

        Some tokenizers put a space before any text they are given, which is wrong in mid-sentence.
        """
        context = prompt[-CONTEXT:]
        before = self.ids(context)
        whole = self.ids(context + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.ids(text)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which tokens a text becomes."""
        parts = [
            self.tokenizer.backend_tokenizer.to_str() if self.tokenizer.is_fast else self.tokenizer.get_vocab(),
            self.tokenizer.chat_template,
            self._probe(),
            {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _probe(self) -> str:
        """A conversation as the chat template writes it today: some templates put the date in."""
        if not self.tokenizer.chat_template:
            return ""
        from jinja2 import TemplateError

        # A template that refuses this conversation says so, or why, when it is given the rows.
        with contextlib.suppress(TemplateError, TypeError, ValueError):
            return self.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        return ""


def hand_over_spaces(prompt: str, text: str) -> tuple[str, str]:
    """Move the prompt's last spaces to the text after it: in most vocabularies a space belongs to the next word."""
    kept = prompt.rstrip(" ")
    return kept, prompt[len(kept) :] + text


def cut_to_fit(
    tokens: Tokens, render: Callable[[dict[str, str]], list[int]], values: dict[str, str], room: int
) -> tuple[list[int] | None, bool]:
    """Shorten the longest values at their ends until what they render to fits.

    Args:
        tokens: The tokenizer.
        render: Values to the tokens of the whole prompt.
        values: The texts that may be cut.
        room: Tokens there is space for.

    Returns:
        The prompt's tokens, or None where even empty values do not fit, and whether anything was cut.
    """
    values, cut = dict(values), False
    while len(ids := render(values)) > room:
        name = max(values, key=lambda name: len(values[name]), default=None)
        if name is None or not values[name]:
            return None, True
        found = tokens.tokenizer(values[name], add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in found["offset_mapping"]]
        keep = max(len(ends) - (len(ids) - room), 0)
        if sum(bool(value) for value in values.values()) > 1:
            # Half a value at most, so that two long ones are cut alike.
            keep = max(keep, len(ends) // 2)
        shorter = values[name][: ends[keep - 1]] if keep else ""
        values[name] = shorter if len(shorter) < len(values[name]) else values[name][:-1]
        cut = True
    return ids, cut
