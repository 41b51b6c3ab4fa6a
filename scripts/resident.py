"""The memory that this process holds while something runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psutil


def largest(act: Callable[[], Any], times: int) -> int:
    """The largest resident size in bytes, looked at every 2 ms, while `act` is called so many times."""
    process, seen, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(times):
        act()
    done.set()
    watcher.join()
    return max(seen)
