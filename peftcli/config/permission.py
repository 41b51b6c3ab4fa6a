"""Whether programs that a model has written may be run: the user's word on the command line, never a recipe's.

It is handed on in the environment, which worker processes inherit; what it held before the command counts for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftcli.config.errors import Mistake, UserError

VARIABLE = "PEFTCLI_ALLOW_CODE"
HELP = "Run the programs that the model writes (task.scoring=code), each in a cage without network or your files."
LEFT_OUT = (
    "the programs that the model writes are not run without --allow-code: pass_at_k is left out, and the texts are "
    "compared instead"
)


@contextmanager
def code(allowed: bool) -> Iterator[None]:
    """Within it generated programs may be run, or may not, in this process and those that it starts."""
    before = os.environ.pop(VARIABLE, None)
    if allowed:
        os.environ[VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def is_given() -> bool:
    """Whether generated programs may be run."""
    return os.environ.get(VARIABLE) == "1"


def require(task: Any) -> None:
    """Stop where a task cannot do without running generated programs and may not.

    Args:
        task: The task's group of a recipe.

    Raises:
        UserError: What would be run, and how to allow it.
    """
    needs = getattr(task, "scoring", None) == "code" and task.best_metric.startswith("pass_at_")
    if not needs or is_given():
        return
    what = f"task.best_metric={task.best_metric} runs Python programs as the model writes them, with the rows' tests"
    hint = (
        "allow it by adding --allow-code: each runs in a process of its own with limits on time and memory, without "
        "network, without reading or writing your files; or add task.best_metric=loss, and none is run"
    )
    raise UserError(Mistake(what, hint=hint))
