"""Work that is done before its result is asked for, in threads, in an order that does not depend on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map(work, items)`, with the next `2 * workers` results made in threads while the last one is used.

    `work` must depend on its item alone. What it raises is raised where its result would have come.
    """
    left = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(left, 2 * workers))
        try:
            while waiting:
                done = waiting.popleft()
                for item in islice(left, 1):
                    waiting.append(pool.submit(work, item))
                yield done.result()
        finally:
            for other in waiting:
                other.cancel()
