"""How a row becomes a prompt and an answer: put together as they are, or through the tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from peftcli.config.errors import Mistake, UserError
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, hand_over_spaces

Prompt = tuple[dict[str, str], Callable[[dict[str, str]], str]]
"""The texts of a prompt that may be cut when it is too long, and the function that puts them together."""
CONVERSATION = "messages"
"""Column of whole conversations, `[{"role", "content"}, ...]` or the same as JSON."""


class Plain:
    """Prompt and completion as they are.

    Args:
        prompt: Template of the prompt.
        completion: Template of the answer.
    """

    def __init__(self, prompt: Template, completion: Template):
        self.prompt_template, self.completion = prompt, completion
        self.needed = list(dict.fromkeys([*prompt.columns, *completion.columns]))

    def check(self, tokens: Tokens) -> None:
        """The end token has to exist."""
        _ = tokens.end

    def prompt(self, row: Mapping[str, Any], tokens: Tokens) -> Prompt:
        return self.prompt_template.values(row), self.prompt_template.render

    def prompt_ids(self, text: str, tokens: Tokens) -> list[int]:
        """Tokens of the prompt; never none, since the first answer token is predicted from the one before it."""
        return tokens.start + tokens.ids(text.rstrip(" ")) or [tokens.end]

    def answer_ids(self, row: Mapping[str, Any], tokens: Tokens) -> list[int] | None:
        """Tokens of the answer and the end token; None where the row has no answer."""
        completion = self.completion.render(self.completion.values(row))
        if not completion.strip():
            return None
        values, render = self.prompt(row, tokens)
        prompt, completion = hand_over_spaces(render(values), completion)
        return [*tokens.continuation(prompt, completion), tokens.end]

    def stops(self, tokens: Tokens) -> list[int]:
        """Tokens that end an answer."""
        return [tokens.end]


class Chat:
    """Through the chat template: the prompt as the user's turn, or a column of whole conversations.

    Args:
        prompt: Template of the user's turn, or `{messages}` for conversations, whose last assistant turn is learnt.
        completion: Template of the assistant's turn; not used for conversations.
        system: System message for conversations that have none.
    """

    def __init__(self, prompt: Template, completion: Template, system: str | None):
        self.prompt_template, self.completion, self.system = prompt, completion, system
        self.conversations = prompt.text.strip() == "{" + CONVERSATION + "}"
        used = [] if self.conversations else completion.columns
        self.needed = list(dict.fromkeys([*prompt.columns, *used]))

    def check(self, tokens: Tokens) -> None:
        """The tokenizer has to have a chat template."""
        if tokens.tokenizer.chat_template is None:
            what = "task.template=chat, but the model's tokenizer has no chat template"
            raise UserError(Mistake(what, hint="take task.template=plain, or the instruct version of the model"))
        self.stops(tokens)

    def prompt(self, row: Mapping[str, Any], tokens: Tokens) -> Prompt:
        turns, _ = self._turns(row)
        if self.conversations:
            values = {str(i): turn["content"] for i, turn in enumerate(turns) if isinstance(turn["content"], str)}

            def render(values: dict[str, str]) -> str:
                cut = [{**turn, "content": values.get(str(i), turn["content"])} for i, turn in enumerate(turns)]
                return self._apply(cut, tokens, open_turn=True)

            return values, render

        def render_template(values: dict[str, str]) -> str:
            turn = {"role": "user", "content": self.prompt_template.render(values)}
            return self._apply([*turns[:-1], turn], tokens, open_turn=True)

        return self.prompt_template.values(row), render_template

    def prompt_ids(self, text: str, tokens: Tokens) -> list[int]:
        """Tokens of the conversation up to the open turn; the template writes its own start token."""
        return tokens.ids(text.rstrip(" "))

    def answer_ids(self, row: Mapping[str, Any], tokens: Tokens) -> list[int] | None:
        """Tokens of the assistant's last turn up to its end token; None where there is no such turn."""
        turns, answer = self._turns(row)
        return self._answer_ids(turns, answer, tokens) if answer and str(answer["content"]).strip() else None

    def stops(self, tokens: Tokens) -> list[int]:
        """The token with which the chat template ends a turn, whatever the tokenizer's end token is."""
        return self._answer_ids([{"role": "user", "content": "x"}], {"role": "assistant", "content": "x"}, tokens)[-1:]

    def _answer_ids(self, turns: list[dict], answer: dict, tokens: Tokens) -> list[int]:
        opened = self._apply(turns, tokens, open_turn=True)
        whole = self._apply([*turns, answer], tokens, open_turn=False)
        if not whole.startswith(opened):
            what = f"the chat template opens an answer with {opened[-40:]!r}, but writes it otherwise in a whole chat"
            raise UserError(Mistake(what, hint="take task.template=plain"))
        ids = tokens.continuation(*hand_over_spaces(opened, whole[len(opened) :]))
        # What the template writes after the turn's end (often a newline) is never asked of the model.
        special = set(tokens.tokenizer.all_special_ids)
        last = max((i for i, token in enumerate(ids) if token in special), default=None)
        return [*ids, tokens.end] if last is None else ids[: last + 1]

    def _turns(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The conversation before the answer, and the answer if the row has one."""
        if not self.conversations:
            turns = [{"role": "user", "content": self.prompt_template.render(self.prompt_template.values(row))}]
            there = all(name in row for name in self.completion.columns)
            text = self.completion.render(self.completion.values(row)) if there else None
            answer = {"role": "assistant", "content": text} if text is not None else None
        else:
            turns = _messages(row)
            last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
            answer = None if last is None else turns[last]
            turns = turns if last is None else turns[:last]
        if self.system is not None and (not turns or turns[0]["role"] != "system"):
            turns = [{"role": "system", "content": self.system}, *turns]
        return turns, answer

    def _apply(self, turns: list[dict], tokens: Tokens, open_turn: bool) -> str:
        from jinja2 import TemplateError

        try:
            return tokens.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(Mistake(f"the chat template refuses a conversation of {roles}: {error}")) from error


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row's conversation as a list of turns, without keys that hold nothing."""
    found, where = row[CONVERSATION], f"row {row.get('row', '?')}, {CONVERSATION}"
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise UserError(Mistake(f"not JSON: {error}", where)) from None
    keys = {"role", "content"}
    if not isinstance(found, list) or not all(isinstance(turn, dict) and keys <= set(turn) for turn in found):
        raise UserError(Mistake(f"not a list of turns with role and content: {str(found)[:80]}", where))
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in found]
