"""Several sources of labelled rows as domains, whose classes are shared out to train, validation and test.

A class belongs to one split by its name, a seed and the domain, so that no class that is measured on was trained on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pyarrow as pa

from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import DataConfig, DomainConfig
from peftcli.data import checking, origins, splitting
from peftcli.data.images.places import COLUMN, identified
from peftcli.data.origins import SPLITS
from peftcli.data.rows import Rows, whole_numbers
from peftcli.data.sampler import generator

HELD_OUT = "held out"
"""Value of the column `role` of rows whose domain is not trained on."""
OWN = "own"


def read(config: DataConfig, needed: list[str], notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The splits of all domains together, and the rows left out of each, by domain and reason.

    Args:
        config: The recipe's `data` group.
        needed: What the task reads of a row, with `label`.
        notes: Gets what was done that the recipe did not ask for word by word.

    Returns:
        Rows with a column for each needed name, and `domain`, `role`, `split` and `row`, the number among all read.

    Raises:
        UserError: Missing files or columns, bad rows (unless they are skipped), too few classes.
    """
    parts: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
    skipped: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    first = 0
    shares: dict[str, dict[str, set[str]]] = {}
    for name, domain in sorted(config.domains.items(), key=lambda item: item[1].like is not None):
        try:
            rows, left_out = _rows(name, domain, config, needed, notes)
            counts = Counter(map(str, rows["label"]))
            shares[name] = (
                _like(name, domain, counts, shares) if domain.like else share(name, domain, config, counts, notes)
            )
        except UserError as error:
            mistakes += [replace(one, where=f"data.domains.{name}: {one.where}".removesuffix(": ")) for one in
                         error.mistakes]  # fmt: skip
            continue
        skipped |= {name: left_out} if left_out else {}
        table = _numbered(rows, name, HELD_OUT if domain.held_out or domain.like else OWN, first)
        first += len(rows)
        labels = [str(label) for label in rows["label"]]
        for split, classes in shares[name].items():
            kept = [i for i, label in enumerate(labels) if label in classes]
            part = table.take(whole_numbers(kept))
            parts[split].append(part.append_column("split", pa.array([split] * len(part), pa.string())))
    if mistakes:
        raise UserError(*mistakes)
    if not any(len(table) for table in parts["train"]):
        raise UserError(Mistake("every domain is held out, and none is left to train on", "data.domains"))
    found = {split: Rows(pa.concat_tables(tables, promote_options="permissive")) for split, tables in parts.items()
             if any(len(table) for table in tables)}  # fmt: skip
    return found, skipped


def share(
    name: str, domain: DomainConfig, config: DataConfig, rows: Counter[str], notes: list[str]
) -> dict[str, set[str]]:
    """The classes of each split.

    A split has no classes, or two at least, which are taken from training.

    Args:
        name: The domain's.
        domain: The domain.
        config: Seed and shares.
        rows: Rows of each class.
        notes: Gets the classes that are too small to be used.

    Raises:
        UserError: Fewer than two classes can be used, or a class that is named is not there.
    """
    left = {label for label, count in rows.items() if count >= max(2, domain.least)}
    if small := sorted(rows.keys() - left):
        listed = ", ".join(small[:5]) + (", ..." if len(small) > 5 else "")
        notes.append(f"{name}: {len(small)} classes of fewer than {max(2, domain.least)} rows are left out: {listed}")
    if len(left) < 2:
        what = f"{len(left)} of {len(rows)} classes have {max(2, domain.least)} rows or more, and a task needs two"
        raise UserError(Mistake(what, hint="a task takes support and query rows from each class: give it more rows"))
    if domain.held_out:
        return {"train": set(), "validation": set(), "test": left}
    named = {split: set(map(str, labels)) for split, labels in domain.classes.items()}
    if wrong := [unknown("split", split, SPLITS) for split in named if split not in SPLITS]:
        raise UserError(*wrong)
    if wrong := [unknown("class", label, left) for labels in named.values() for label in labels if label not in left]:
        raise UserError(*wrong)
    taken = [label for labels in named.values() for label in labels]
    if twice := sorted(label for label, count in Counter(taken).items() if count > 1):
        raise UserError(Mistake(f"class {twice[0]!r} is in two splits", "classes"))
    order = sorted(left - set(taken))
    order = [order[i] for i in generator("classes", config.seed, name).permutation(len(order))]
    shares = {"test": config.test_share, "validation": config.validation_share}
    found = {split: named.get(split, set()) for split in SPLITS}
    for split, part in shares.items():
        if split not in named and part > 0:
            count = max(2, round(part * len(left)))
            found[split], order = set(order[:count]), order[count:]
    if "train" not in named:
        found["train"] = set(order)
    if short := [split for split, labels in found.items() if len(labels) == 1 or (split == "train" and not labels)]:
        others = f" ({len(small)} more have fewer than {max(2, domain.least)} rows)" if small else ""
        what = f"{len(left)} classes{others} leave {len(found[short[0]])} for {short[0]}, and a task needs two"
        hint = "name its classes, such as classes: {validation: [], test: []} to train on all, or held_out: true"
        raise UserError(Mistake(what, hint=hint))
    return found


def _like(
    name: str, domain: DomainConfig, rows: Counter[str], shares: dict[str, dict[str, set[str]]]
) -> dict[str, set[str]]:
    """The test classes that another domain has too."""
    assert domain.like is not None
    if domain.like not in shares:
        raise UserError(unknown("domain", domain.like, shares, "like"))
    left = {label for label in shares[domain.like]["test"] if rows[label] >= max(2, domain.least)}
    if len(left) < 2:
        what = f"{len(left)} of the test classes of {domain.like} have rows here, and a task needs two"
        raise UserError(Mistake(what, "like"))
    return {"train": set(), "validation": set(), "test": left}


def _rows(
    name: str, domain: DomainConfig, config: DataConfig, needed: list[str], notes: list[str]
) -> tuple[Rows, dict[str, int]]:
    """The domain's rows of all splits of its source."""
    columns = dict(domain.columns)
    asked = [*needed, *dict.fromkeys([*domain.only, *([domain.distinct] if domain.distinct else [])])]
    part = DataConfig(
        source=domain.source, name=domain.name, subset=domain.subset, revision=domain.revision, files=domain.files,
        columns={column: columns.get(column, column) for column in asked}, bad_rows=config.bad_rows,
    )  # fmt: skip
    own: list[str] = []
    found = origins.find(part, own)
    notes += [f"{name}: {note}" for note in own]
    mapping = checking.mapping(part, list(dict.fromkeys(asked)), found, notes)
    tables, left_out, bad = [], Counter[str](), []
    for split, origin in found.items():
        rows, unreadable = origin.read(mapping)
        if COLUMN in needed:
            rows, missing = identified(rows)
            unreadable = unreadable + missing
        rows, unusable = checking.usable(rows, mapping, needed, origin)
        problems, total = unreadable + unusable, len(rows) + len(unreadable) + len(unusable)
        mistake, note = checking.settled(f"{split} of {name}", problems, total, config.bad_rows)
        bad += [mistake] if mistake else []
        notes += [note] if note else []
        left_out.update(one.what.split(":")[0] for one in problems)
        tables.append(rows.table)
    if bad:
        raise UserError(*bad)
    rows = Rows(pa.concat_tables(tables, promote_options="permissive"))
    return _chosen(name, domain, rows, needed, notes), dict(left_out)


def _chosen(name: str, domain: DomainConfig, rows: Rows, needed: list[str], notes: list[str]) -> Rows:
    """Rows with the asked values, the first of each that shows the same."""
    for column, wanted in domain.only.items():
        values = [wanted] if isinstance(wanted, str) else wanted
        there = set(map(str, rows[column]))
        if strange := [unknown(f"value of {column}", value, there, "only") for value in values if value not in there]:
            raise UserError(*strange)
        rows = splitting.keep(rows, column, values)
    if domain.distinct:
        cells = rows[domain.distinct]
        first = {str(cells[i]): i for i in reversed(range(len(rows)))}
        if len(first) < len(rows):
            notes.append(f"{name}: {len(first)} of {len(rows)} rows, one of each {domain.distinct}")
        rows = rows.select(sorted(first.values()))
    return Rows(rows.table.select([*needed]))


def _numbered(rows: Rows, domain: str, role: str, first: int) -> pa.Table:
    table, count = rows.table, len(rows)
    labels = pa.array([str(label) for label in rows["label"]])
    table = table.set_column(table.column_names.index("label"), "label", labels)
    table = table.append_column("domain", pa.array([domain] * count)).append_column("role", pa.array([role] * count))
    return table.append_column("row", whole_numbers(range(first, first + count)))
