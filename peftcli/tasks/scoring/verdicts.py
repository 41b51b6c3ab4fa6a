"""A program of its own that compares mathematical answers: lines of JSON in, a line of JSON out for each.

math-verify limits its time by signals, which only a process's main thread may use, and SymPy can be caught in one call
for hours. So this runs beside the program; a comparison that takes too long or too much memory ends this process,
and the one who asked starts another for the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import sys

LIMIT = 20
"""Seconds for one comparison, all its attempts together."""
READY = "ready"
"""First line of the answers."""
MEMORY = 4 * 2**30
"""Bytes of address space."""


def equal(expected: str, written: str) -> bool:
    """Whether two answers, without the text around them, mean the same."""
    from math_verify import parse, verify

    wanted, found = bare(expected), bare(written)
    return wanted == found or verify(parse(f"${wanted}$"), parse(f"${found}$"))


def bare(answer: str) -> str:
    """The answer without what says nothing: text marks, percent signs, spaces and full stops around it."""
    answer = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"\\?[%$]|\\[!,;]", "", answer).strip(" .")


def main() -> None:
    """Answer each line `[expected, written]` with true or false, after a line that says that all is well."""
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    equal("1", "2")  # what is loaded at the first call counts for nobody
    print(READY, file=answers, flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            verdict = equal(*json.loads(line))
        except Exception:
            verdict = False
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
