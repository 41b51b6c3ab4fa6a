"""The program in this process, or in one of its own."""

from __future__ import annotations

from tests.cli.conftest import peft, recipe, start

__all__ = ["peft", "recipe", "start"]
