"""A class or several for each picture. B rows of a batch, K classes, N rows, S pixels a side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import ImageConfig, ModelConfig
from peftcli.data.ahead import ahead
from peftcli.data.collate import IGNORE, MULTIPLE
from peftcli.data.images import augment, places
from peftcli.data.images.decode import ImageProblem, read
from peftcli.data.images.prepared import source, workers
from peftcli.data.images.sheet import data_uri
from peftcli.data.rows import Rows
from peftcli.data.sampler import generator
from peftcli.models import image_reader
from peftcli.models.image_reader import ImageReader
from peftcli.tasks import labels
from peftcli.tasks.contract import Encoded, Evaluation, Loss, Quality, Sizes, Task, check_metric
from peftcli.tasks.images import alarms, metrics
from peftcli.tasks.images.gallery import hang
from peftcli.tasks.images.outcome import SEPARATOR, Outcome
from peftcli.tasks.inference import measuring

WORST = 24
"""Mistakes of which the report shows the picture."""


class ImagesTask(Task):
    """A linear head on the features of a vision model: one class of several, several at once, or a defect and its
    absence."""

    architecture = "image-classification"

    def __init__(self, config: ImageConfig, seed: int = 0):
        super().__init__(config, seed)
        self.needed, self.asked = [places.COLUMN, "label"], [places.COLUMN]
        self.image_size, self.workers = config.image_size, workers()
        self.several_labels = config.multilabel
        self.best_metric = check_metric(config.best_metric, metrics.MULTI if config.multilabel else metrics.SINGLE)
        self.higher_is_better = config.best_metric not in metrics.LOWER_IS_BETTER
        self.augment = augment.parse(config.augment)
        self.repeats = self.augment is None and not config.augment.mixup and not config.augment.cutmix
        self.weights_K: Tensor | None = None
        """Of each class in the loss; None where all weigh the same."""
        self.alarms: alarms.Alarms | None = None
        """What is to be found and from which score on; None where nothing is. Known after `fit` and `settle`."""

    def recall(self, lineage: Mapping[str, Any]) -> None:
        super().recall(lineage)
        self.alarms = alarms.known(lineage.get("alarms"))

    def reader(self, model: ModelConfig) -> ImageReader:
        return image_reader.find(model, self.image_size)

    def labels_of(self, cell: Any) -> Iterable[str]:
        """The labels in a cell."""
        if not self.config.multilabel:
            return labels.one(cell)
        parts = cell.split(SEPARATOR) if isinstance(cell, str) else cell if isinstance(cell, list) else [cell]
        return dict.fromkeys(str(part).strip() for part in parts if str(part).strip())

    def fit(self, splits: Any) -> None:
        """Take the label set from the training rows.

        Raises:
            CheckFailed: `label-mismatch`: fewer than two labels, or one that only other splits have.
            UserError: `task.positive` is none of the labels, there are more than two, or their names do not tell.
        """
        seen = labels.count(splits.train, self.labels_of)
        self.labels = labels.learn(splits, seen, self.labels_of)
        positive = alarms.positive(self.config.positive, self.labels)
        if positive is not None:
            self.alarms = alarms.Alarms(positive)
        if positive != self.config.positive:
            other = next(label for label in self.labels if label != positive)
            splits.notes.append(f"{positive!r} is taken for the defect, {other!r} not (task.positive={other} if wrong)")
        if self.config.class_weights:
            self.weights_K = self._weigh(seen, len(splits.train))

    def _weigh(self, seen: Counter[str], rows: int) -> Tensor:
        count_K = torch.tensor([seen[label] for label in self._classes], dtype=torch.float64)
        if self.config.multilabel:
            return (rows - count_K).clamp_min(1) / count_K  # of a present label, beside 1 for an absent one
        return rows / (len(count_K) * count_K)  # 1 in the mean over the training rows

    @property
    def _classes(self) -> list[str]:
        assert self.labels is not None, "fit() comes first, or labels from a saved run"
        return self.labels

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """A row without its picture: `row`, `name` and `labels`, the numbers of its classes."""
        numbers = {label: i for i, label in enumerate(self._classes)}
        given = list(self.labels_of(row["label"]))
        if strange := [label for label in given if label not in numbers]:
            known = ", ".join(self._classes)
            what = f"row {row.get('row')} has label {strange[0]!r}, known labels are: {known}"
            raise CheckFailed("label-mismatch", what)
        name = places.name(row[places.COLUMN], row.get("row", 0))
        return {"row": row.get("row", 0), "name": name, "labels": [numbers[label] for label in given]}

    def encode_split(self, rows: Rows, tokenizer: Any) -> Encoded:
        columns = Rows(rows.table.append_column("name", _names(rows)).drop_columns([places.COLUMN]))
        encoded = [self.encode({**row, places.COLUMN: {"path": row["name"]}}, tokenizer) for row in columns]
        return hang(rows, encoded, tokenizer, self.config.augment.crop < 1, self.config.animated)

    def told(self, counts: Mapping[str, int]) -> str:
        odd = [f"{n} {what}" for what, n in counts.items() if what not in ("rows", "dropped", "truncated")]
        dropped = [f"{counts['dropped']} left out"] if counts["dropped"] else []
        return ", ".join([f"{counts['rows']} pictures", *dropped, *odd])

    def classes(self, encoded: Encoded) -> list[int] | None:
        return [one[0] for one in encoded.rows["labels"]] if self.config.balanced_sampling else None

    def collate(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        draw: tuple[int, int] | None = None,
        multiple: int = MULTIPLE,
    ) -> dict[str, Tensor]:
        """`pixel_values`, float32 [B, 3, S, S], and `labels`, float32 [B, K]: the share of each class.

        What is drawn for a picture depends on seed, epoch and row alone. A row with a `partner` is mixed with it in the
        way drawn for its optimiser step, `step`; `place` tells such rows apart. Rows with `hidden` give those as
        `pixel_values`.
        """
        if "hidden" in rows[0]:
            return {"pixel_values": torch.stack([row["hidden"] for row in rows]), "labels": self._targets(rows)}
        if draw is not None and "partner" in rows[0]:
            return self._mixed(rows, tokenizer, draw)
        pixels_BSSC = np.stack([self._pixels(row, tokenizer, draw) for row in rows])
        return {"pixel_values": tokenizer.normalise(pixels_BSSC), "labels": self._targets(rows)}

    def partners(self, batch: list[int], draw: tuple[int, ...]) -> list[int] | None:
        mixes = self.config.augment.mixup or self.config.augment.cutmix
        return generator("partners", *draw).permutation(batch).tolist() if mixes else None

    def _mixed(self, rows: list[dict[str, Any]], reader: ImageReader, draw: tuple[int, int]) -> dict[str, Tensor]:
        others = [row["partner"] for row in rows]
        once = {row["place"]: row for row in (*rows, *others)}
        at = {place: number for number, place in enumerate(once)}
        made_NCSS = reader.normalise(np.stack([self._pixels(row, reader, draw) for row in once.values()]))
        pixels_BCSS, others_BCSS = (made_NCSS[[at[row["place"]] for row in part]] for part in (rows, others))
        key = generator("mix", *draw, rows[0]["step"])
        given = (pixels_BCSS, self._targets(rows), others_BCSS, self._targets(others))
        pixels_BCSS, targets_BK = augment.mix(*given, self.config.augment, key)
        return {"pixel_values": pixels_BCSS, "labels": targets_BK}

    def _targets(self, rows: list[dict[str, Any]]) -> Tensor:
        targets_BK = torch.zeros(len(rows), len(self._classes))
        for target_K, row in zip(targets_BK, rows, strict=True):
            target_K[row.get("labels", [])] = 1.0
        return targets_BK

    def _pixels(self, row: dict[str, Any], reader: ImageReader, draw: tuple[int, int] | None) -> np.ndarray:
        """A row's picture at the model's size, changed at random where `draw` says so."""
        change = self.augment if draw is not None else None
        pixels = row.get("pixels")
        if pixels is None or (change and "picture" in row):
            try:
                pixels = read(source(row["picture"]), self.config.animated)
            except ImageProblem as problem:
                hint = "mend it, or take it out of the rows"
                raise UserError(Mistake(f"picture is {problem}", str(row.get("name")), hint=hint)) from problem
            if change and draw:
                large_enough = reader.reduced(pixels, self.config.augment.crop)
                pixels = change(large_enough, generator("augment", *draw, row["row"]))
            return reader.fit(pixels)
        return change(pixels, generator("augment", *draw, row["row"])) if change and draw else pixels

    def blank(self, rows: int, length: int, device: Any, parts: Sequence[Sizes] = ()) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.empty(rows, 3, length, length, device=device),
            "labels": torch.zeros(rows, len(self._classes), device=device),
        }

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"][:, 0] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """Cross-entropy with shares of classes as targets, or the mean over the labels of theirs where there may be
        several; times the classes' weights."""
        logits_BK = _logits(model, batch)
        targets_BK = batch["labels"].to(logits_BK.dtype)
        learnt_B = (targets_BK[:, 0] != IGNORE).to(logits_BK.dtype)
        weights_K = None if self.weights_K is None else self.weights_K.to(logits_BK)
        if self.config.multilabel:
            loss_BK = F.binary_cross_entropy_with_logits(logits_BK, targets_BK, pos_weight=weights_K, reduction="none")
            loss_B = loss_BK.mean(1)
        else:
            share = self.config.label_smoothing
            targets_BK = targets_BK * (1 - share) + share / targets_BK.shape[1]
            loss_B = -(targets_BK * (1 if weights_K is None else weights_K) * logits_BK.log_softmax(1)).sum(1)
        return Loss((loss_B * learnt_B).sum(), self.weight(batch))

    def _outcome(self, model, parts, reader, device, precision) -> Outcome:
        """What the model says of rows in batches, which are made while it computes."""
        found = []
        with measuring(model, device, precision):
            for batch in ahead(lambda part: self.collate(part, reader), parts, self.workers):
                found.append(_logits(model, {"pixel_values": batch["pixel_values"].to(device)}).cpu())
        threshold = self.alarms.threshold(self.config.false_alarms) if self.alarms else None
        return self._judged(torch.cat(found), threshold)

    def _judged(self, logits_NK: Tensor, threshold: float | None) -> Outcome:
        """Scores with what says what they mean."""
        positive = self._classes.index(self.alarms.positive) if self.alarms else None
        rate, several = self.config.false_alarms, self.config.multilabel
        return Outcome(logits_NK, self._classes, positive, several, rate, threshold)

    def settle(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32"):
        """As in the base class: from here on, a picture has what is looked for where its score is above that of most
        validation pictures that do not have it."""
        if self.alarms is None:
            return
        outcome = self._outcome(model, _parts(encoded, batch_size), tokenizer, device, precision)
        scored = zip(outcome.odds().tolist(), encoded.rows["labels"], strict=True)
        others = [odds for odds, labels in scored if labels != [outcome.positive]]
        self.alarms = replace(self.alarms, others=tuple(sorted(others, reverse=True)))

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """As in the base class; `generate` costs nothing here and gives all rows as examples, the worst first."""
        outcome = self._outcome(model, _parts(encoded, batch_size), tokenizer, device, precision)
        rows = list(encoded.rows)
        truth = [row["labels"] for row in rows]
        measured = outcome.measure(truth)
        if not generate:
            return Evaluation(measured)
        examples = outcome.examples(rows)
        answers = {**outcome.drawn(truth), "worst": self._worst(encoded, examples, tokenizer)}
        answers |= {"false_alarms": self.config.false_alarms}
        answers |= {"alarms": self.alarms.told(self.config.false_alarms, outcome, truth)} if self.alarms else {}
        return Evaluation(measured, examples, answers=answers)

    def _worst(self, encoded: Encoded, examples: list[dict[str, Any]], reader: ImageReader) -> list[dict[str, Any]]:
        """The worst mistakes with their pictures as the model saw them."""
        wrong = [example for example in examples if not example["correct"]][:WORST]
        at = {row: place for place, row in enumerate(encoded.rows["row"])}
        seen = encoded.take([at[example["row"]] for example in wrong])
        return [
            {**example, "picture": data_uri(self._pixels(row, reader, None))}
            for example, row in zip(wrong, seen, strict=True)
        ]

    def baselines(self, splits: Any) -> list[Quality]:
        """The classes' shares of the training rows, said of every picture."""
        held_out = splits.test if splits.test is not None else splits.validation
        if held_out is None:
            return []
        seen = labels.count(splits.train, self.labels_of)
        share_K = torch.tensor([seen[label] / len(splits.train) for label in self._classes])
        truth = [[self._classes.index(label) for label in self.labels_of(cell)] for cell in held_out["label"]]
        several = self.config.multilabel
        logits_NK = (share_K.logit() if several else share_K.log()).expand(len(truth), -1)
        measured = self._judged(logits_NK, None).measure(truth)
        return [Quality("shares of the classes" if several else "majority class", measured)]

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """The likeliest label of each picture, that to be found where its score is high enough, or those likelier than
        not: `{"input", "predicted", "score", "probabilities"}`."""
        given = [{"picture": row[places.COLUMN], **row} for row in rows]
        parts = (given[at : at + batch_size] for at in range(0, len(given), batch_size))
        outcome = self._outcome(model, parts, tokenizer, device, precision)
        names = [places.name(row[places.COLUMN], row.get("row", 0)) for row in given]
        return [{"input": name, **answer} for name, answer in zip(names, outcome.answers(), strict=True)]

    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """The picture's name and size, and in marks its label."""
        size = f"{tokenizer.size} x {tokenizer.size} pixels"
        named = SEPARATOR.join(self._classes[i] for i in encoded_row["labels"])
        return Text(f"{encoded_row['name']}, {size} ").append(f"[[{named}]]", style="bold green")


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores of the classes, fp32 [B, K]; fp64 of a model in it."""
    logits_BK = model(pixel_values=batch["pixel_values"]).logits
    return logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float()


def _parts(encoded: Encoded, size: int) -> Iterator[list[dict[str, Any]]]:
    for at in range(0, len(encoded), size):
        yield encoded.take(range(at, min(at + size, len(encoded))))


def _names(rows: Rows) -> Any:
    """The pictures' names, without their bytes."""
    import pyarrow as pa
    from pyarrow import compute

    return compute.struct_field(rows.table.column(places.COLUMN), "path").cast(pa.large_string())
