"""Work done in advance comes in its order, one window ahead, with its errors in their places."""

from __future__ import annotations

import time

import pytest

from peftcli.data.ahead import ahead


def test_results_come_in_order_whatever_takes_longest() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(ahead(slow_first, range(20), 3)) == [i * i for i in range(20)]


def test_no_more_than_the_window_is_begun() -> None:
    begun: list[int] = []
    for result in ahead(lambda item: begun.append(item) or item, range(100), 2):
        assert len(begun) <= result + 5


def test_an_error_is_raised_where_its_result_would_have_come() -> None:
    results = ahead(lambda item: 1 // (3 - item), range(6), 2)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
