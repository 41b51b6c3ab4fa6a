"""The rows that tasks are drawn from, by domain and class. To the loop, a row of this split is a whole task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftcli.config.errors import Mistake, UserError
from peftcli.data.domains import HELD_OUT
from peftcli.data.episodes import Drawn, Rules, draw
from peftcli.data.rows import Rows
from peftcli.data.sampler import generator
from peftcli.tasks.contract import Encoded

SHOWN = 3
"""Rows that cannot be read and are named."""


@dataclass(frozen=True)
class Pool(Encoded):
    """A split of tasks.

    Attributes:
        source: The encoded rows: `take` gives them as the task collates them.
        members: Positions in `source` of the rows of each class, by domain and class.
        held_out: Domains that are not trained on.
        rules: How tasks are drawn.
        key: Seed of the fixed tasks.
        fixed: How many there are of each domain; 0 where each task of a domain is drawn anew.
    """

    source: Encoded = field(default_factory=lambda: Encoded(Rows.from_list([]), [], {}))
    members: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    rules: Rules = field(default_factory=Rules)
    key: tuple[int | str, ...] = ()
    fixed: int = 0

    def take(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Tasks by their number: `row`, and this split as `pool`."""
        return [{"row": index, "pool": self} for index in indices]

    @property
    def domains(self) -> list[str]:
        return list(self.members)

    def domain_of(self, index: int) -> str:
        """Of a fixed task: all tasks of one domain, then all of the next."""
        return self.domains[index // self.fixed]

    def task(self, index: int, at: tuple[int, int] | None = None) -> tuple[str, Drawn]:
        """A task and its domain.

        Args:
            index: Its number.
            at: Seed and epoch of a task of training; None gives the fixed one.
        """
        dice = generator("episode", *(at or self.key), index)
        domain = self.domain_of(index) if self.fixed else self.domains[int(dice.integers(len(self.members)))]
        return domain, draw(list(self.members[domain].values()), self.rules, dice)

    def names(self, domain: str, drawn: Drawn) -> list[str]:
        """The classes of a task by their names."""
        known = list(self.members[domain])
        return [known[c] for c in drawn.classes]


def gather(rows: Rows, source: Encoded, rules: Rules, key: tuple[int | str, ...], fixed: int, episodes: int) -> Pool:
    """A split of tasks over encoded rows.

    Args:
        rows: With `row`, `label`, `domain` and `role`, as `peftcli.data.domains` has them.
        source: The same, encoded; some may be missing there.
        rules: How tasks are drawn.
        key: Seed of the fixed tasks.
        fixed: Fixed tasks of each domain, or 0.
        episodes: Tasks of an epoch where they are not fixed.

    Raises:
        UserError: No domain has two classes of two rows that can be read.
    """
    about = {row: place for place, row in enumerate(rows["row"])}
    labels, domains, roles = rows["label"], rows["domain"], rows["role"]
    found: dict[str, dict[str, list[int]]] = {}
    for position, row in enumerate(source.rows["row"]):
        place = about[row]
        found.setdefault(domains[place], {}).setdefault(labels[place], []).append(position)
    whole = {
        domain: {label: np.asarray(places) for label, places in sorted(classes.items()) if len(places) > 1}
        for domain, classes in sorted(found.items())
    }
    members = {domain: classes for domain, classes in whole.items() if len(classes) > 1}
    if not members:
        what = f"no domain has two classes of two rows in {key[-1]} that can be read"
        hint = "give it more rows, or mend those that cannot be read"
        raise UserError(Mistake(what, "data.domains", hint=hint), *source.bad[:SHOWN])
    held_out = frozenset(domain for domain, role in zip(domains, roles, strict=True) if role == HELD_OUT)
    count = fixed * len(members) if fixed else episodes
    classes = Counter({domain: len(part) for domain, part in members.items()})
    counts = {**source.counts, "domains": len(members), "classes": classes.total(), "episodes": count}
    if lost := len(set(zip(domains, labels, strict=True))) - classes.total():
        counts["lost_classes"] = lost
    return Pool(
        source.rows, [1] * count, counts, source.bad, source=source, members=members, held_out=held_out, rules=rules,
        key=key, fixed=fixed,
    )  # fmt: skip
