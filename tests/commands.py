"""The command line in a process of its own, and what it may say of a fault."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.forkserver import server

PATIENCE = 120.0
"""Seconds after which a test stops waiting."""
ALONE = 'import sys\nsys.modules["peftcli"] = sys.modules["peft"] = None\n'
"""Lines after which Python has neither this package nor PEFT."""


def assert_said(result: Any, code: int, *words: str) -> None:
    """A command's result has this exit code and says these words, and not in a traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output


def wait_until(true: Callable[[], bool], said: Callable[[], str] = str, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, f"waited in vain: {said()}"
        time.sleep(0.02)


def _main(arguments: Sequence[str], output: str, largest: int | None) -> None:
    shown = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    os.setsid()
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["peft", *arguments]
    from peftcli.cli.main import main

    main()


def run_readme(folder: Path, **filled: str) -> str:
    """What the lines in the card print, `PICTURE=path` put in place of `YOUR PICTURE`."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    for name, value in filled.items():
        assert f'"YOUR {name}"' in code
        code = code.replace(f'"YOUR {name}"', json.dumps(value))
    # -P: the folder with this package is not looked at.
    done = subprocess.run(
        [sys.executable, "-P", "-c", ALONE + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Command:
    """`peft ...` in a process of its own, with what it has printed so far.

    Args:
        arguments: After `peft`.
        output: File for what it prints.
        largest: Largest file in bytes that it may write: what a full disk is to a program, without one.
    """

    exception = None

    def __init__(self, arguments: Sequence[Any], output: Path, largest: int | None = None):
        self._output = output
        self._process = server.Process(target=_main, args=([str(a) for a in arguments], str(output), largest))
        self._process.start()

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.is_file() else ""

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def exit_code(self) -> int:
        """Waits for the end."""
        self._process.join(PATIENCE)
        assert self._process.exitcode is not None, self.output
        return self._process.exitcode

    def kill(self) -> None:
        """End it with all that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.join()
