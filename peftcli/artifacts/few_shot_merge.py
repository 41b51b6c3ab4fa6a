"""A few-shot run and a support set as a plain Transformers folder: the weights of this one task, and its classes.

Pictures get a linear head whose row for a class is its prototype p_c, made as long as the scores are wide:
W_c = 10 p_c / (|p_c| r), r the mean length of the support's features f. Its logits are the run's own scores times
|f| / r, so each row gets the class that `peft predict RUN --support` gives it, and about the same probability. Heads of
language models see a row's last token and not the mean over its tokens: for texts the folder has the model without a
head, and the prototypes beside it.

N rows, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcli.artifacts import adapter, atomic, card, few_shot
from peftcli.artifacts.export import check_place
from peftcli.artifacts.merge import Drift, compare, merged_in_float32, round_to
from peftcli.artifacts.tuned import Tuned, open_tuned
from peftcli.config.errors import CheckFailed
from peftcli.config.schema import ImageConfig
from peftcli.methods import episodes
from peftcli.models import features
from peftcli.models.precision import DTYPES
from peftcli.tasks.episodes.support import Support

PROTOTYPES = "prototypes.safetensors"
KEY = "prototypes"


def export(
    path: Path,
    to: Path,
    support: Path,
    overrides: Sequence[str] = (),
    *,
    dtype: str = "same",
    force: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the plain model of the task that a support set is.

    Args:
        path: The run's folder.
        to: The new folder; it may be there if it is empty.
        support: As `peft predict --support`.
        overrides: As `peftcli.config.rerun.load` allows.
        dtype: Type of the saved weights, `fp32`, `bf16` or `fp16`; `same` is fp32: a task's change is finer
            than the steps of bf16, in which the base may be.
        force: Use the base although its weights are not those that the adapter was trained on.
        overwrite: Replace an earlier merge at `to`.

    Returns:
        `merge` and `reload`, a `Drift` of the scores as a dict each; `probability`, the largest difference of a
        probability from the run's own (None for texts); `rows`, `classes`, `dtype`, `head`, `notes`, `folder`.

    Raises:
        UserError: No finished few-shot run, no support set, or `to` is taken.
        CheckFailed: `unsafe-weights`, `adapter-keys`, `base-mismatch`, `merge-drift`, `disk-full`.
    """
    check_place(to, overwrite)
    tuned = open_tuned(path, overrides, force=force)
    tuned.model.float()  # as `export`: so that the comparison sees what rounding the weights does, and nothing else
    merged, seen, notes = of_task(tuned, support)
    shown, linear = seen.support, seen.linear
    wanted = torch.float32 if dtype == "same" else DTYPES[dtype]
    round_to(merged, wanted)
    round_to(merged, torch.float32)
    report: dict[str, Any] = {"merge": asdict(seen.check(merged, "merged"))}
    report |= {"probability": seen.probability(merged) if linear else None}
    about = {"rows": len(shown.classes_N), "classes": shown.names, "head": "linear" if linear else PROTOTYPES}
    report |= {**about, "dtype": str(wanted).removeprefix("torch."), "forced_base": tuned.forced_base, "notes": notes}
    with atomic.folder(to) as partial:
        round_to(merged, wanted)
        adapter.write_model(merged, tuned.tokenizer, partial)
        if not linear:
            save_file({KEY: seen.means_CD.float().cpu().contiguous()}, partial / PROTOTYPES)
            seen.means_CD = load_file(partial / PROTOTYPES)[KEY].to(tuned.device)
        read: Any = adapter.load_model(type(merged), partial, dtype=torch.float32)
        again = read.to(tuned.device).eval()
        report["reload"] = asdict(seen.check(again, "saved"))
        lineage = adapter.portable(tuned.lineage) | {"labels": shown.names, "merged": report}
        if linear:
            lineage["task"] = as_pictures(tuned)
        adapter.describe(partial, lineage, card.model(lineage, type(merged).__name__, {}))
    return report | {"folder": str(to)}


def of_task(tuned: Tuned, support: Path) -> tuple[Any, Seen, list[str]]:
    """The plain model of the task that a support set is: with a linear head for pictures, without a head for texts.

    Args:
        tuned: A few-shot run, in float32; its model is used up.
        support: As `peft predict --support`.

    Returns:
        The model, what it is held to, and notes.

    Raises:
        UserError: The run is not few-shot, or there is no such support set.
    """
    shown, notes = few_shot.read(tuned, support)
    shown = shown.to(tuned.device)
    linear = tuned.task.architecture == "image-classification"
    with torch.no_grad():
        features_ND, scores_NC, base_NC = _reference(tuned, shown)
        means_CD = episodes.prototypes(features_ND, shown.classes_N, shown.ways)
        model: Any = plain(tuned.model, shown)
    if linear:
        put_head(model, means_CD, features_ND.norm(dim=1).mean(), shown.names)
    else:
        model = model.base_model
    tolerance = tuned.config.training.merge_tolerance
    return model, Seen(shown, features_ND, scores_NC, base_NC, means_CD, linear, tolerance), notes


def prototypes(folder: Path, classes: int) -> Tensor:
    """The prototypes beside the model of a task of texts [C, D].

    Raises:
        CheckFailed: `adapter-keys`: they are missing or damaged, or of another number of classes.
    """
    path = folder / PROTOTYPES
    there = path.is_file() and KEY in adapter.tensor_names(path)
    means_CD = load_file(path)[KEY] if there else torch.empty(0)
    if len(means_CD) != classes:
        what = f"{path} does not hold a prototype of each of {classes} classes"
        raise CheckFailed("adapter-keys", what, "merge it again: peft merge RUN --support FILE --to DIR")
    return means_CD


def as_pictures(tuned: Tuned) -> dict[str, Any]:
    """What the lineage calls the task of a model with a linear head: classes of pictures like any others."""
    return asdict(ImageConfig(image_size=tuned.task.image_size))


def plain(model: Any, support: Support) -> nn.Module:
    """The model of a task without anything of ours in it, headless; the given one is used up.

    Args:
        model: Of a few-shot run.
        support: On the model's device.
    """
    own = getattr(model, "merge_for", None)
    if own is not None:
        return own(support.inputs, support.classes_N, support.ways)
    return merged_in_float32(model) if isinstance(model, PeftModel) else model


@torch.no_grad()
def put_head(model: Any, means_CD: Tensor, length: Tensor, names: list[str]) -> None:
    """Give a vision model a linear head that answers with the nearest prototype.

    Args:
        model: Without a head.
        means_CD: The prototypes.
        length: r, a usual length of features.
        names: Of the classes.
    """
    head = nn.Linear(means_CD.shape[1], len(names)).to(means_CD)
    head.weight.copy_(episodes.SCALE * nn.functional.normalize(means_CD, dim=1) / length)
    head.bias.zero_()
    if isinstance(model.classifier, nn.Sequential):  # ResNet flattens first
        model.classifier[-1] = head
    else:
        model.classifier = head
    model.num_labels = len(names)
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def _reference(tuned: Tuned, support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D] and scores [N, C] of the support by the run's own model, and scores by its base."""
    given = (support.inputs, support.classes_N, support.ways)

    def seen() -> Tensor:
        return episodes.in_parts(lambda part: episodes.wide(tuned.model(**part).logits), support.inputs)

    def scored(features_ND: Tensor) -> Tensor:
        return episodes.scores(features_ND, episodes.prototypes(features_ND, support.classes_N, support.ways))

    with episodes.adapted(tuned.model, *given):
        own_ND = seen()
    if not isinstance(tuned.model, PeftModel):
        return own_ND, scored(own_ND), scored(own_ND)
    with tuned.model.disable_adapter():
        return own_ND, scored(own_ND), scored(seen())


@dataclass
class Seen:
    """What the model of a task is held to: what the run itself makes of the support.

    Attributes:
        support: The rows.
        features_ND: Theirs.
        scores_NC: Theirs.
        base_NC: Their scores by the untouched base.
        means_CD: The prototypes.
        linear: The model has a linear head.
        tolerance: The largest `Drift.share`.
    """

    support: Support
    features_ND: Tensor
    scores_NC: Tensor
    base_NC: Tensor
    means_CD: Tensor
    linear: bool
    tolerance: float

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        if self.linear:
            return episodes.in_parts(lambda part: model(**part).logits.float(), self.support.inputs)
        return episodes.scores(features.Headless(model)(**self.support.inputs).logits, self.means_CD)

    def check(self, model: Any, what: str) -> Drift:
        """How far the scores are from the unmerged ones'.

        Raises:
            CheckFailed: `merge-drift`: another class, or beyond the tolerance.
        """
        found_NC = self._logits(model)
        if self.linear:  # to the scores' own width, which the run divides each row by
            lengths_N = self.features_ND.norm(dim=1)
            found_NC = found_NC * (lengths_N.mean() / lengths_N)[:, None]
        drift = compare(found_NC.cpu(), self.scores_NC.cpu(), self.base_NC.cpu())
        if drift.share > self.tolerance or drift.agreement < 1:
            said = f"the {what} model gives {drift.agreement:.1%} of the support the class that the run gives it, and "
            said += f"scores that differ by {drift.largest:.3g} at most, where their spread is {drift.spread:.3g}"
            raise CheckFailed("merge-drift", said, "rounding is finer with --dtype fp32")
        return drift

    def probability(self, model: Any) -> float:
        """The largest difference of a row's probability of a class from the run's own."""
        return float((self._logits(model).softmax(1) - self.scores_NC.softmax(1)).abs().max())
