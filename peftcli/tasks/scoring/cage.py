"""Generated Python programs, each run with its tests in a process of its own that can do little else than compute.

What the cage is. Each program runs in a new Python process and session with the standard library alone, without this
process's environment, open files or packages. `inside.py` then gives up, for good and before the program begins:
CPU time, memory, the number of open files and their size (rlimits); every system call that computing does not need,
so that there is no network of any kind, no other process, no signal to others and no writing of any file (seccomp);
and reading, but for Python's own files and an empty working directory (Landlock). A program gets wall time too; what
it prints is thrown away. None of this needs root, and a kernel that refuses any of it is a mistake, not a weaker cage.

What it is not. The kernel is shared, so a hole in the kernel is a hole in the cage; for programs by an enemy take a
virtual machine. A program can see how large and old files anywhere are, not what they hold. Program and tests share
an interpreter, as in the published harnesses: a program that sets out to deceive its tests can. One that merely ends
before they do cannot: passing means that a secret, unread until the tests are through, came back.

Linux on x86_64 and aarch64.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftcli.config.errors import Mistake, UserError
from peftcli.tasks.scoring import inside

STARTING = 60.0
"""Seconds that an interpreter may take to start on a busy machine."""
MOST_TOLD = 4096
"""Bytes that are read of a process."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 30
    """Of address space."""
    open_files: int = 32

    def rlimits(self) -> dict[str, int]:
        """By the names of the `resource` module."""
        return {
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "NOFILE": self.open_files,
            "FSIZE": 0,
            "CORE": 0,
            "MEMLOCK": 0,
        }


@dataclass(frozen=True)
class Job:
    """A program, and the tests that are run after it in the same names."""

    program: str
    tests: str


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    outcome: Literal["passed", "failed", "timed out", "killed"]
    error: str = ""
    """The last line of its error; empty where it passed."""


def check() -> None:
    """Try the cage with an empty program.

    Raises:
        UserError: This system cannot cage a program; with the reason.
    """
    if sys.platform != "linux" or platform.machine() not in inside.ARCHITECTURES:
        raise _impossible(f"the cage is made for Linux on x86_64 or aarch64, not {sys.platform} {platform.machine()}")
    (found,) = run([Job("", "pass")])
    if found.outcome != "passed":
        raise _impossible(f"an empty program was {found.outcome}: {found.error}")


def run(jobs: Sequence[Job], limits: Limits | None = None) -> list[Result]:
    """Run programs, as many at once as there are cores.

    Args:
        jobs: Programs with their tests.
        limits: Of each program.

    Returns:
        A result for each job, in order.

    Raises:
        UserError: The system does not put up the fence.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="peft-cage-") as folder:
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        try:
            return list(pool.map(lambda job: _run(job, limits, folder), jobs))
        finally:
            pool.shutdown(cancel_futures=True)


def _run(job: Job, limits: Limits, folder: str) -> Result:
    secret = secrets.token_hex(16).encode()
    asked = {"program": job.program, "tests": job.tests, "limits": limits.rlimits()}
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(Path(inside.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PYTHONHASHSEED": "0"},  # sets and their order are the same every time
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    answers = process.stdout.fileno()
    try:
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(asked).encode() + b"\n" + secret + b"\n")
        began = _read(answers, len(inside.READY), STARTING)
        if began != inside.READY:
            why = (began or b"") + (_read(answers, MOST_TOLD, 1.0) or b"")
            raise _impossible(why.decode(errors="replace").strip() or "the interpreter does not start")
        told = _read(answers, MOST_TOLD, limits.wall_seconds)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # not waited for yet, so the number is still its own
        process.stdout.close()
        code = process.wait()
    if told is None or code == -signal.SIGXCPU:
        return Result("timed out", f"longer than {limits.cpu_seconds} s of CPU or {limits.wall_seconds:g} s in all")
    return _judge(told.decode(errors="replace").strip(), secret.decode(), code)


def _judge(told: str, secret: str, code: int) -> Result:
    if told == secret:
        return Result("passed")
    for outcome in ("failed", "killed"):
        if told.startswith(f"{outcome} "):
            return Result(outcome, told.removeprefix(f"{outcome} "))  # type: ignore[arg-type]
    if code < 0:
        return Result("killed", f"ended by {signal.Signals(-code).name}")
    return Result("failed", f"the program ended before its tests did (exit code {code})")


def _read(file: int, most: int, seconds: float) -> bytes | None:
    """What a process writes until it closes the pipe, at most so many bytes; None where that takes too long."""
    found, end = b"", time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        ready.register(file, selectors.EVENT_READ)
        while len(found) < most:
            if not ready.select(max(end - time.monotonic(), 0)):
                return None
            if not (piece := os.read(file, most - len(found))):
                break
            found += piece
    return found


def _impossible(why: str) -> UserError:
    hint = "train without --allow-code, and score the generated programs with a tool of your choice"
    return UserError(Mistake(f"generated code cannot be run safely here: {why}", hint=hint))
