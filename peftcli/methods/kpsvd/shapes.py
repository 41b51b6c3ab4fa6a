"""The shapes of a term's factors: a weight [O, I] with O = m p and I = n q is a sum of terms [m, n] ⊗ [p, q]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import isqrt
from typing import NamedTuple

from peftcli.config.errors import Mistake, UserError


class Split(NamedTuple):
    """Shapes of the factors: the left one is m x n, the right one p x q."""

    m: int
    n: int
    p: int
    q: int

    @property
    def rows(self) -> int:
        """Rows O of the weight."""
        return self.m * self.p

    @property
    def columns(self) -> int:
        """Columns I of the weight."""
        return self.n * self.q

    @property
    def size(self) -> int:
        """Parameters of a term, its singular value aside."""
        return self.m * self.n + self.p * self.q

    @property
    def terms(self) -> int:
        """Terms that make up any weight exactly."""
        return min(self.m * self.n, self.p * self.q)

    @property
    def rank(self) -> int:
        """Largest matrix rank of a term."""
        return min(self.m, self.n) * min(self.p, self.q)

    @property
    def macs(self) -> int:
        """Multiplications of a term for one input row, in the cheaper of the two orders."""
        return min(
            self.n * self.q * self.p + self.m * self.n * self.p, self.m * self.n * self.q + self.m * self.q * self.p
        )


def key(rows: int, columns: int) -> str:
    """How recipes and files name a weight's shape."""
    return f"{rows}x{columns}"


@cache
def square(rows: int, columns: int) -> Split:
    """The split with the fewest parameters; of those the one whose terms can have the highest rank, then the cheapest.

    A prime number of rows and of columns leaves a column and a row: the terms are those of an ordinary SVD.
    """
    splits = [Split(m, n, rows // m, columns // n) for m in divisors(rows) for n in divisors(columns)]
    return min(splits, key=lambda split: (split.size, -split.rank, split.macs, split.n, split.m))


def thin(rows: int, columns: int) -> Split:
    """A column and a row, whose Kronecker product is their outer product: a LoRA of rank one."""
    return Split(rows, 1, 1, columns)


def choose(rows: int, columns: int, factors: str, given: Mapping[str, Sequence[int]]) -> Split:
    """The split of a weight of this shape.

    Args:
        rows: O.
        columns: I; of a convolution, input channels of a group times kernel positions.
        factors: `square` or `thin`, where none is given.
        given: Splits by shape of the weight, `m, n, p, q` each.

    Raises:
        UserError: The given split is of another shape.
    """
    wanted = given.get(key(rows, columns))
    if wanted is None:
        return square(rows, columns) if factors == "square" else thin(rows, columns)
    where = f"method.splits.{key(rows, columns)}"
    if len(wanted) != 4 or min(wanted) < 1:
        raise UserError(Mistake(f"{where} is {list(wanted)}, expected four whole numbers m, n, p, q of 1 or more"))
    split = Split(*wanted)
    mistakes = [
        Mistake(
            f"{where}: {name} x {other} = {first} x {second} = {first * second}, and the weight has {size} {what}",
            hint=f"nearest factor pairs of {size}: " + ", ".join(f"{a} x {b}" for a, b in nearest_pairs(size, first)),
        )
        for name, other, first, second, size, what in (
            ("m", "p", split.m, split.p, rows, "rows"),
            ("n", "q", split.n, split.q, columns, "columns"),
        )
        if first * second != size
    ]
    if mistakes:
        raise UserError(*mistakes)
    return split


def nearest_pairs(number: int, wanted: int, most: int = 3) -> list[tuple[int, int]]:
    """The factor pairs of a number whose first factor is closest to the wanted one."""
    return [(a, number // a) for a in sorted(divisors(number), key=lambda a: (abs(a - wanted), a))[:most]]


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, in order."""
    small = [a for a in range(1, isqrt(number) + 1) if number % a == 0]
    return tuple(sorted({*small, *(number // a for a in small)}))
