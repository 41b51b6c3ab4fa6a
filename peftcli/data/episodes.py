"""Few-shot tasks drawn from labelled rows by Meta-Dataset's rules. C classes of a task, N rows.

Source: Triantafillou et al., "Meta-Dataset", ICLR 2020, section 3.2 and appendix A.2 (various ways, various shots).
Everything drawn depends on the generator alone, and on the classes in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rules:
    """Limits of a task.

    Attributes:
        ways: Least and most classes; a domain with fewer than the least gives all it has.
        support: Most support rows of a task; never fewer than one a class.
        class_support: Most support rows of a class that count towards the size of the support.
        queries: Most query rows of a class.
    """

    ways: tuple[int, int] = (5, 50)
    support: int = 500
    class_support: int = 100
    queries: int = 10


@dataclass(frozen=True)
class Drawn:
    """A task.

    Attributes:
        support: Positions of the support rows, class by class.
        query: Positions of the query rows, class by class.
        support_classes: The class of each, 0 to C - 1.
        query_classes: The class of each.
        classes: Which of the domain's classes these are, [C].
    """

    support: np.ndarray
    query: np.ndarray
    support_classes: np.ndarray
    query_classes: np.ndarray
    classes: np.ndarray

    @property
    def ways(self) -> int:
        return len(self.classes)


def draw(members: Sequence[np.ndarray], rules: Rules, dice: np.random.Generator) -> Drawn:
    """Draw a task.

    Args:
        members: Positions of the rows of each class of the domain; two classes of two rows at least.
        rules: The limits.
        dice: Where chance comes from.
    """
    least = min(rules.ways[0], len(members))
    ways = int(dice.integers(least, min(rules.ways[1], len(members)) + 1))
    chosen_C = dice.permutation(len(members))[:ways]
    sizes_C = np.array([len(members[c]) for c in chosen_C])
    queries = query_rows(sizes_C, rules.queries)
    shots_C = support_rows(sizes_C - queries, rules, dice)
    picked = [dice.permutation(members[c]) for c in chosen_C]
    every_C = np.arange(ways)
    return Drawn(
        np.concatenate([rows[queries : queries + shots] for rows, shots in zip(picked, shots_C, strict=True)]),
        np.concatenate([rows[:queries] for rows in picked]),
        every_C.repeat(shots_C),
        every_C.repeat(queries),
        chosen_C,
    )


def query_rows(sizes_C: np.ndarray, most: int) -> int:
    """Query rows of each class, the same of all: at most half of the smallest class."""
    return max(1, min(most, int(sizes_C.min()) // 2))


def support_rows(left_C: np.ndarray, rules: Rules, dice: np.random.Generator) -> np.ndarray:
    """Support rows of each class [C], between 1 and what it has.

    The size of the support is a random share of what there is, at most `rules.support`; classes share it by their
    sizes, each times a random factor between 1/2 and 2.

    Args:
        left_C: Rows of each class that are not in the query.
        rules: The limits.
        dice: Where chance comes from.
    """
    share = 1.0 - dice.random()  # (0, 1]
    wanted = sum(math.ceil(share * min(rules.class_support, int(left))) for left in left_C)
    size = max(len(left_C), min(rules.support, wanted))
    weight_C = np.exp(dice.uniform(math.log(0.5), math.log(2.0), len(left_C))) * left_C
    share_C = weight_C / weight_C.sum()
    return np.minimum(np.floor(share_C * (size - len(left_C))).astype(int) + 1, left_C)
