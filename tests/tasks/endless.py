"""The program that compares answers, with two answers that end it."""

from __future__ import annotations

import os
import time

from peftcli.tasks.scoring import verdicts

equal = verdicts.equal


def hostile(expected: str, written: str) -> bool:
    """As the program's own, but one answer never returns, and another ends the process."""
    if written == "endless":
        time.sleep(600)
    if written == "killed":
        os.abort()
    return equal(expected, written)


if __name__ == "__main__":
    verdicts.LIMIT = 2
    verdicts.equal = hostile
    verdicts.main()
