"""Prompt templates: plain text with the names of columns in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftcli.config.errors import Mistake, UserError, unknown


@dataclass(frozen=True)
class Template:
    """A text with columns in braces; `{{` and `}}` stand for braces.

    Args:
        text: The template, such as `"Question: {question}\\nAnswer:"`.
        key: The config key it comes from, for messages.

    Raises:
        UserError: Unbalanced braces, braces without a name, or a conversion or format after the name.
    """

    text: str
    key: str

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise self._mistake(str(error).lower()) from None
        for _, name, layout, conversion in parts:
            if name == "":
                raise self._mistake("braces without a column name")
            if layout or conversion:
                raise self._mistake(f"{{{name}}} carries a format, which templates do not have")

    def _mistake(self, what: str) -> UserError:
        return UserError(
            Mistake(f"{self.key}={self.text!r}: {what}", hint="write {column} for a column, {{ and }} for braces")
        )

    @property
    def columns(self) -> list[str]:
        """The columns named, each once, in order."""
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.text) if name))

    def values(self, row: Mapping[str, Any]) -> dict[str, str]:
        """The named columns of a row as text; an empty cell is an empty text, a list of texts a line each.

        Raises:
            UserError: The row lacks a column.
        """
        if missing := [name for name in self.columns if name not in row]:
            raise UserError(*(unknown("column", name, row, where=self.key) for name in missing))
        return {name: _text(row[name]) for name in self.columns}

    def fill(self, row: Mapping[str, Any]) -> str:
        """The template with a row's values."""
        return self.render(self.values(row))

    def render(self, values: Mapping[str, str]) -> str:
        """The template with each name replaced by its value, taken literally."""
        parts = string.Formatter().parse(self.text)
        return "".join(literal + (values[name] if name else "") for literal, name, _, _ in parts)


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    return "" if value is None else str(value)
