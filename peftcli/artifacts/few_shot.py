"""A finished few-shot run and a support set of a user's own: shown to the model, and what the model made of it.

M experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.artifacts.run_folder import RunFolder
from peftcli.artifacts.tuned import Tuned
from peftcli.config import rerun
from peftcli.config.errors import Mistake, UserError, nearest
from peftcli.data import support as rows_of_support
from peftcli.data.images import places
from peftcli.tasks.episodes import support as supports
from peftcli.tasks.episodes.support import SUPPORT, Support
from peftcli.tasks.episodes.task import EpisodesTask

EVEN = 0.01
"""A weight this near to an equal share of all says nothing."""
NAMED = 4
"""Experts, and classes, that a sentence names."""


@dataclass(frozen=True)
class Shown:
    """A support set that a model was shown.

    Attributes:
        support: The rows.
        notes: What was done with them that nobody asked for word by word.
        experts: What the model says of its experts, as `peftcli.methods.smat` tells it; empty where it has none.
        domains: Mean weights of the experts on the run's own held-out tasks, by domain, [M] each.
    """

    support: Support
    notes: list[str]
    experts: dict[str, Any] = field(default_factory=dict)
    domains: dict[str, list[float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """What it is and which experts it chose, as JSON: the run's domains nearest first, by half the sum of the
        differences of the weights, 0 to 1."""
        told: dict[str, Any] = {"classes": self._counts(), "rows": len(self.support.classes_N)}
        if not self.experts:
            return told
        return told | {"experts": {**self.experts, "nearest": self._nearest()}}

    def words(self) -> list[str]:
        """The same in sentences."""
        counts = self._counts()
        listed = ", ".join(list(counts)[:NAMED]) + (", ..." if len(counts) > NAMED else "")
        said = [f"support: {len(self.support.classes_N)} rows of {len(counts)} classes ({listed})"]
        if not self.experts:
            return [*said, "this run has no experts to choose from: its model is the same for every task"]
        weights_M = self.experts["weights"]
        if len(weights_M) == 1:
            return [
                *said,
                f"there is one expert, and its weight is 1; it changes {self.experts['density'][0]:.1%} of the weights",
            ]
        order = sorted(range(len(weights_M)), key=lambda m: -weights_M[m])
        even = 1 / len(weights_M)
        told = [f"{m + 1} with {weights_M[m]:.1%}" for m in order[:NAMED]] + ["..."] * (len(order) > NAMED)
        said.append(f"of {len(order)} experts it chose {', '.join(told)}; an equal share is {even:.1%}")
        low, high = (f"{end(self.experts['density']):.1%}" for end in (min, max))
        said.append(f"an expert changes {low if low == high else f'{low} to {high}'} of the weights")
        if weights_M[order[0]] - even < EVEN:
            said.append("the weights are all but equal: the router finds nothing special about these classes")
        if near := self._nearest():
            then = f", then {near[1]['domain']}" if len(near) > 1 else ""
            said.append(f"of the run's own tasks, those of {near[0]['domain']} chose most like it{then}")
        return said

    def _counts(self) -> dict[str, int]:
        classes = self.support.classes_N.tolist()
        return {name: classes.count(i) for i, name in enumerate(self.support.names)}

    def _nearest(self) -> list[dict[str, Any]]:
        weights_M = self.experts["weights"]
        found = [
            {"domain": name, "distance": round(sum(abs(a - b) for a, b in zip(weights_M, mean_M, strict=True)) / 2, 6)}
            for name, mean_M in self.domains.items()
            if len(mean_M) == len(weights_M) > 1
        ]
        return sorted(found, key=lambda one: one["distance"])


def check(run: RunFolder, asked: str) -> None:
    """Stop where an option is for few-shot runs and this is none, before anything is loaded.

    Raises:
        UserError: It is none.
    """
    if rerun.load(run.config).task.type != "episodes":
        raise _refused(run.path, asked)


def _refused(path: Path, asked: str) -> UserError:
    what = f"{path} has learnt one set of answers, and takes no few-shot tasks"
    return UserError(Mistake(what, asked, hint="a few-shot run does: peft train vit/emoji_smat"))


def task_of(tuned: Tuned) -> EpisodesTask:
    """The run's task.

    Raises:
        UserError: The run is not few-shot.
    """
    # A merged model of texts knows its own classes.
    if not isinstance(tuned.task, EpisodesTask) or tuned.task.known is not None:
        raise _refused(tuned.run.path, SUPPORT)
    return tuned.task


def read(tuned: Tuned, path: Path) -> tuple[Support, list[str]]:
    """A support set as the run's model reads it, and notes.

    Raises:
        UserError: The run is not few-shot, or there is no support set of two classes or more that can be read.
    """
    task = task_of(tuned)
    rows, notes = rows_of_support.read(path, tuned.config.data, task.needed)
    support, more = supports.gather(task, rows, tuned.tokenizer, tuned.config.data.bad_rows)
    return support, [*notes, *more]


@contextmanager
def shown(tuned: Tuned, path: Path) -> Iterator[Shown]:
    """Within it the run's model answers with the classes of this support set. Raises as `read`."""
    support, notes = read(tuned, path)
    with supports.shown(task_of(tuned), tuned.model, support, tuned.device, tuned.precision):
        chosen = getattr(tuned.model, "chosen", None)
        yield Shown(support, notes, chosen() if chosen else {}, _domains(tuned))


def _domains(tuned: Tuned) -> dict[str, list[float]]:
    tasks = ((tuned.run.read_report().get("quality") or {}).get("answers") or {}).get("experts") or {}
    return {name: [sum(one) / len(part) for one in zip(*part, strict=True)] for name, part in tasks.items()}


def truth(tuned: Tuned, rows: list[dict[str, Any]]) -> dict[int, str]:
    """What answered rows are, by position, where they say it: in the column of labels, or by their picture's folder."""
    column = tuned.config.data.columns.get("label", "label")
    found: dict[int, str] = {}
    for place, row in enumerate(rows):
        if row.get(column) not in (None, ""):
            found[place] = str(row[column])
        elif column not in row and len(parts := Path(str(row.get(places.COLUMN, ""))).parts) > 1:
            found[place] = parts[0]
    return found


def judged(rows: list[dict[str, Any]], truth: Mapping[int, str], names: list[str]) -> list[str]:
    """Notes on answers to rows of which some say what they are: how many are right, and classes the support lacks.

    Args:
        rows: The answers.
        truth: What some of them are, by position.
        names: The support's classes.
    """
    if not set(truth.values()) & set(names):
        near = {label: nearest(label, names) for label in sorted(set(truth.values()))}
        meant = ", ".join(f"{label} (did you mean {name}?)" for label, name in near.items() if name)
        return [f"labels of the input that are no class of the support: {meant}"] if meant else []
    notes = []
    if strange := sorted(set(truth.values()) - set(names)):
        count = sum(label in strange for label in truth.values())
        notes.append(
            f"{count} rows of the input are of {', '.join(strange)}, which the support does not have: each is taken "
            f"for one of {', '.join(names)} all the same"
        )
    known = {place: label for place, label in truth.items() if label in names}
    right = sum(rows[place]["predicted"] == label for place, label in known.items())
    return [*notes, f"{right} of {len(known)} rows whose label is known are answered right ({right / len(known):.1%})"]
