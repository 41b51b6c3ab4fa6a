"""Asking a run to stop: it ends at the next step boundary, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType


class Stopped(Exception):
    """The run was asked to stop: what it has done is on disk."""


class StopRequest:
    """Remembers the first of SIGTERM, SIGUSR1 (a cluster's warning) and Ctrl-C; a second Ctrl-C ends at once.

    A context manager: the former handlers come back at its end.

    Args:
        patient: A second Ctrl-C means nothing: a worker gets each from the terminal and from its parent.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, patient: bool = False) -> None:
        self.name = ""
        self.patient, self._interrupted = patient, False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {s: signal.signal(s, self._note) for s in self.SIGNALS}
            outer = getattr(self._former[signal.SIGTERM], "__self__", None)
            if isinstance(outer, StopRequest):  # whoever started this one was already asked
                self.name = outer.name
        else:
            self._former = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Stop between two parts of something long.

        Raises:
            Stopped: A signal asked for it.
        """
        if self.name:
            raise Stopped

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted and not self.patient:
                raise KeyboardInterrupt
            self._interrupted = True
            if not self.patient:
                with suppress(OSError):  # not print: the program may be in the midst of one
                    os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once\n")
        self.name = self.name or signal.Signals(number).name
