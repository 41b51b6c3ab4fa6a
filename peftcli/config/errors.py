"""What can go wrong, in two kinds: the user's mistake (exit code 2) and a failed run or named check (exit code 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mistake:
    """One thing the user can mend: what is wrong, where it stands, what is allowed instead.

    Attributes:
        what: One sentence, naming the key or file and its value.
        where: `file:line`, or `override optim.lrr=1`, or empty where there is no such place.
        allowed: The values or keys that would have been accepted.
        nearest: The accepted name that is closest to what was written, if one is close.
        hint: The command or change that mends it.
    """

    what: str
    where: str = ""
    allowed: tuple[str, ...] = field(default=())
    nearest: str = ""
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.nearest:
            lines.append(f"  did you mean: {self.nearest}")
        if self.allowed:
            lines.append(f"  allowed: {', '.join(self.allowed)}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)


class UserError(Exception):
    """The user's mistakes, all at once. The command line prints them and exits with 2."""

    def __init__(self, *mistakes: Mistake | str):
        self.mistakes = [Mistake(m) if isinstance(m, str) else m for m in mistakes]
        super().__init__("\n".join(str(m) for m in self.mistakes))


class CheckFailed(Exception):
    """A named check stopped the run. The command line prints it and exits with 1.

    Args:
        check: The check's name, one of those that `peft ls checks` prints.
        what: What was found, with the names and numbers.
        hint: What the user can change.
    """

    def __init__(self, check: str, what: str, hint: str = ""):
        self.check, self.what, self.hint = check, what, hint
        super().__init__(f"{check}: {what}" + (f"\n  {hint}" if hint else ""))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to `name`, or an empty string where none is close."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def unknown(kind: str, name: str, known: Iterable[str], where: str = "", hint: str = "") -> Mistake:
    """The mistake of naming something that does not exist."""
    known = tuple(sorted(known))
    return Mistake(f"unknown {kind} {name!r}", where, known, nearest(name, known), hint)
