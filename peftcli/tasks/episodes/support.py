"""A support set of a user's own: what a few-shot model is shown, and the answers that it then gives.

N rows, B rows at once, C classes, D features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from peftcli.config.errors import Mistake, UserError
from peftcli.data import checking
from peftcli.data.images import places
from peftcli.data.rows import Rows
from peftcli.methods import episodes as few_shot
from peftcli.tasks.inference import measuring

if TYPE_CHECKING:
    from peftcli.tasks.episodes.task import EpisodesTask

MOST = 100
"""Rows of a class that are looked at, as in Meta-Dataset's tasks."""
SUPPORT = "--support"


@dataclass(frozen=True)
class Support:
    """Some rows of each class.

    Attributes:
        inputs: Arguments of the model's forward pass, [N, ...] each.
        classes_N: Class of each row, 0 to C - 1.
        names: Of the classes, in the order of the alphabet, [C].
    """

    inputs: dict[str, Tensor]
    classes_N: Tensor
    names: list[str]

    @property
    def ways(self) -> int:
        """C."""
        return len(self.names)

    def to(self, device: Any) -> Support:
        """The same on a device."""
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return Support(moved, self.classes_N.to(device), self.names)


@dataclass(frozen=True)
class Known:
    """What the answers to rows are compared with: the classes' names, and their mean features [C, D]."""

    names: list[str]
    means_CD: Tensor


def gather(task: EpisodesTask, rows: Rows, tokenizer: Any, policy: str) -> tuple[Support, list[str]]:
    """A support set as a model reads it.

    Args:
        task: Encodes.
        rows: As `peftcli.data.support.read` gives them.
        tokenizer: The model's.
        policy: `data.bad_rows`.

    Returns:
        The support, and notes.

    Raises:
        UserError: Pictures cannot be read and are not to be left out, or there are fewer than two classes.
    """
    encoded = task.encode_rows(rows, tokenizer)
    mistake, note = checking.settled("support", encoded.bad, len(rows), policy)
    if mistake:
        raise UserError(mistake)
    notes = [note] if note else []
    label_of = dict(zip(rows["row"], (str(one) for one in rows["label"]), strict=True))
    members: dict[str, list[int]] = {}
    for place, row in enumerate(encoded.rows["row"]):
        members.setdefault(label_of[row], []).append(place)
    if gone := sorted(set(label_of.values()) - members.keys()):
        notes.append(f"support: no row of {', '.join(gone)} is left, so nothing can be taken for it")
    if len(members) < 2:
        said = f"one class, {next(iter(members))!r}" if members else "no class"
        hint = "two classes or more, each with a folder of its own (pictures) or a value of its own in `label`"
        raise UserError(
            Mistake(f"the support set has {said}, and there is nothing to tell it from", SUPPORT, hint=hint)
        )
    for name, found in members.items():
        if len(found) > MOST:
            digests = {place: _digest(row) for place, row in zip(found, encoded.take(found), strict=True)}
            notes.append(f"support: {MOST} of {len(found)} rows of {name} are looked at, evenly drawn")
            ordered = sorted(found, key=lambda place: digests[place])
            members[name] = [ordered[i * len(found) // MOST] for i in range(MOST)]
    names = sorted(members)
    chosen = [place for name in names for place in members[name]]
    classes_N = torch.from_numpy(np.repeat(np.arange(len(names)), [len(members[name]) for name in names]))
    return Support(task.inputs(encoded.take(chosen), tokenizer), classes_N, names), notes


def _digest(row: Mapping[str, Any]) -> str:
    """What a row shows, and not where it stands."""
    return hashlib.sha256(repr({name: value for name, value in row.items() if name != "row"}).encode()).hexdigest()


@contextmanager
def shown(task: EpisodesTask, model: Any, support: Support, device: Any, precision: str) -> Iterator[Known]:
    """Within it the model has the weights of the task, and `task.predict` answers with the support's classes."""
    support = support.to(device)
    with measuring(model, device, precision), few_shot.adapted(model, support.inputs, support.classes_N, support.ways):
        features_ND = few_shot.in_parts(lambda part: few_shot.wide(model(**part).logits), support.inputs)
        task.known = Known(support.names, few_shot.prototypes(features_ND, support.classes_N, support.ways))
        try:
            yield task.known
        finally:
            task.known = None


def answer(
    task: EpisodesTask, model: Any, rows: Iterable[Mapping[str, Any]], tokenizer: Any, size: int, device: Any
) -> list[dict[str, Any]]:
    """The likeliest class of each row, `size` at once, within `shown`: `{"input", "predicted", "score",
    "probabilities"}`."""
    assert task.known is not None, "within `shown`"
    given, known, found = list(rows), task.known, []
    for start in range(0, len(given), size):
        part = given[start : start + size]
        batch = {
            name: value.to(device) for name, value in task.inputs(_encoded(task, part, tokenizer), tokenizer).items()
        }
        chances_BC = few_shot.scores(few_shot.wide(model(**batch).logits), known.means_CD).softmax(1)
        for row, chances in zip(part, chances_BC.tolist(), strict=True):
            best = max(range(len(chances)), key=chances.__getitem__)
            found.append({
                "input": _name(task, row), "predicted": known.names[best], "score": chances[best],
                "probabilities": dict(zip(known.names, chances, strict=True)),
            })  # fmt: skip
    return found


def _encoded(task: EpisodesTask, rows: list[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    if not task.pictures:
        return [task.encode(row, tokenizer) for row in rows]
    return [{"pixels": row.get("pixels"), "picture": row[places.COLUMN]} for row in rows]


def _name(task: EpisodesTask, row: Mapping[str, Any]) -> str:
    if task.pictures:
        return places.name(row[places.COLUMN], row.get("row", 0))
    return task.template.render({name: str(value).strip() for name, value in task.template.values(row).items()})
