"""Few-shot tasks of pictures or texts. E tasks of a batch, N rows of a task, C classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import EpisodesConfig, ModelConfig
from peftcli.data.collate import IGNORE, MULTIPLE, pad
from peftcli.data.episodes import Rules
from peftcli.data.images import places
from peftcli.data.images.decode import read
from peftcli.data.images.prepared import source, workers
from peftcli.data.rows import Rows
from peftcli.methods import episodes as few_shot
from peftcli.methods.episodes import Episode
from peftcli.models import image_reader
from peftcli.tasks import labels
from peftcli.tasks.contract import Encoded, Loss, Sizes, Task, bare, check_metric
from peftcli.tasks.episodes import kept, measure
from peftcli.tasks.episodes import support as supports
from peftcli.tasks.episodes.pool import Pool, gather
from peftcli.tasks.images.gallery import hang
from peftcli.tasks.inference import measuring
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit, pad_id

INPUTS = ("pixel_values", "input_ids", "attention_mask")
"""Names of a model's inputs among the tensors of a batch."""


class EpisodesTask(Task):
    """Tells a task's classes apart by the mean feature of each; what is trained are the features."""

    base_answers = True
    unit = "tasks"

    def __init__(self, config: EpisodesConfig, seed: int = 0):
        super().__init__(config, seed)
        self.pictures = config.reads == "pictures"
        self.architecture = "image-classification" if self.pictures else "sequence-classification"
        self.template = Template(config.prompt, "task.prompt")
        self.asked = [places.COLUMN] if self.pictures else self.template.columns
        self.needed = [*self.asked, "label"]
        self.image_size = config.image_size
        self.workers = workers() if self.pictures else 1
        self.labels = []
        self.best_metric = check_metric(config.best_metric, ("accuracy", "loss"))
        self.higher_is_better = config.best_metric != "loss"
        self._training: tuple[Pool, Any, str] | None = None
        self._kept: tuple[Tensor | None] | None = None
        self.known: supports.Known | None = None
        """The classes that rows are taken for; within `supports.shown` alone."""
        self.rules = Rules(config.ways, config.support, config.class_support, config.queries)

    def reader(self, model: ModelConfig) -> Any:
        return image_reader.find(model, self.image_size) if self.pictures else super().reader(model)

    def labels_of(self, cell: Any) -> tuple[str]:
        """The class in a cell."""
        return labels.one(cell)

    def fit(self, splits: Any) -> None:
        """Check that no class of a domain is in two splits.

        Raises:
            CheckFailed: `label-mismatch`: a class is trained on and measured.
        """
        seen: dict[tuple[str, str], str] = {}
        least = self.config.ways[0]
        for split in ("train", "validation", "test"):
            rows = getattr(splits, split)
            for key in set(zip(rows["domain"], rows["label"], strict=True)) if rows is not None else ():
                if seen.setdefault(key, split) != split:
                    what = f"class {key[1]!r} of {key[0]} is in {seen[key]} and in {split}"
                    raise CheckFailed("label-mismatch", what, "each class belongs to one split")
        counts = Counter((split, domain) for (domain, _), split in seen.items())
        splits.notes.extend(
            f"{domain} has {count} classes in {split}: its tasks have all of them, fewer than task.ways asks for"
            for (split, domain), count in sorted(counts.items())
            if count < least
        )

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """A row without its picture: `row` and `name`; of text `row` and `input_ids`."""
        number = row.get("row", 0)
        if self.pictures:
            return {"row": number, "name": places.name(row[places.COLUMN], number)}
        tokens: Tokens = self.tokens(tokenizer)
        values = {name: value.strip() for name, value in self.template.values(row).items()}

        def render(values: dict[str, str]) -> list[int]:
            return tokens.start + tokens.ids(self.template.render(values).rstrip(" "))

        ids, cut = cut_to_fit(tokens, render, values, self.config.max_length)
        if not ids:
            raise UserError(Mistake(f"row {number} is empty, or task.max_length is too short", "task.prompt"))
        return {"row": number, "input_ids": ids, "labels": [0] * len(ids), "truncated": int(cut)}

    def encode_split(self, rows: Rows, tokenizer: Any) -> Pool:
        """Tasks over the split's rows: drawn anew in each epoch to train on, fixed ones to be measured on."""
        name = rows["split"][0]
        fixed = {"validation": self.config.validation_episodes, "test": self.config.test_episodes}.get(name, 0)
        key = (self.config.seed, name)
        pool = gather(rows, self.encode_rows(rows, tokenizer), self.rules, key, fixed, self.config.episodes)
        if name == "train":
            self._training = (
                pool,
                tokenizer,
                f"{rows.fingerprint()} {tokenizer.fingerprint}"
                if self.pictures
                else f"{rows.fingerprint()} {self.tokens(tokenizer).fingerprint} {self.config}",
            )
        return pool

    def encode_rows(self, rows: Rows, tokenizer: Any) -> Encoded:
        """Labelled rows one by one, without tasks over them."""
        if self.pictures:
            bare_rows = [self.encode(row, tokenizer) for row in _named(rows)]
            return hang(rows, bare_rows, tokenizer, originals=False)
        found = [self.encode(row, tokenizer) for row in rows]
        lengths = [len(row["input_ids"]) for row in found]
        counts = {"rows": len(found), "dropped": 0, "truncated": sum(row["truncated"] for row in found)}
        return Encoded(Rows.from_list(found), lengths, counts)

    def told(self, counts: Mapping[str, int]) -> str:
        """`Pool.counts` in words."""
        things = "pictures" if self.pictures else "texts"
        parts = [f"{counts['rows']} {things} of {counts['classes']} classes in {counts['domains']} domains"]
        parts += [f"{counts['episodes']} tasks"]
        if lost := counts.get("lost_classes"):
            parts.append(f"{lost} classes left out for want of rows that can be read")
        return ", ".join(parts + [f"{n} {what}" for what in ("dropped", "truncated") if (n := counts.get(what))])

    def collate(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        draw: tuple[int, int] | None = None,
        multiple: int = MULTIPLE,
    ) -> dict[str, Tensor]:
        """Tasks one after another, the support of each before its query: the model's inputs [all rows, ...]; of each
        row `class` and `place`, that in its split; of each task `labels` [E], the number of its domain, `ways`
        [E] and `sizes` [E, 2], rows of support and query."""
        parts: dict[str, list[Any]] = {"class": [], "place": [], "labels": [], "sizes": [], "ways": []}
        taken: list[dict[str, Any]] = []
        for row in rows:
            pool: Pool = row["pool"]
            domain, drawn = pool.task(row["row"], draw)
            chosen = np.concatenate([drawn.support, drawn.query])
            taken += pool.source.take(chosen.tolist())
            parts["class"] += [*drawn.support_classes.tolist(), *drawn.query_classes.tolist()]
            parts["place"] += chosen.tolist()
            parts["labels"].append(pool.domains.index(domain))
            parts["sizes"].append([len(drawn.support), len(drawn.query)])
            parts["ways"].append(drawn.ways)
        tensors = {name: torch.tensor(values) for name, values in parts.items()}
        return {**self.inputs(taken, tokenizer, multiple), **tensors}

    def blank(self, rows: int, length: int, device: Any, parts: Sequence[Sizes] = ()) -> dict[str, Tensor]:
        if self.pictures:
            inputs = {"pixel_values": torch.empty(rows, 3, length, length, device=device)}
        else:
            inputs = super().blank(rows, length, device)
        with unset_fake_temporarily():  # what is computed depends on their values
            sizes = {"sizes": torch.tensor([part[:2] for part in parts], device="cpu")}
            sizes["ways"] = torch.tensor([ways for _, _, ways in parts], device="cpu")
        labels = {"labels": torch.zeros(len(parts), dtype=torch.long, device=device)}
        return {**inputs, **labels, "class": torch.zeros(rows, dtype=torch.long, device=device), **sizes}

    def inputs(self, rows: list[dict[str, Any]], tokenizer: Any, multiple: int = MULTIPLE) -> dict[str, Tensor]:
        """The model's inputs of encoded rows, [N, ...] each."""
        if not self.pictures:
            plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
            return {name: value for name, value in pad(plain, pad_id(tokenizer), multiple=multiple).items()
                    if name in INPUTS}  # fmt: skip
        pixels = [row["pixels"] for row in rows]
        if any(one is None for one in pixels):
            pixels = [tokenizer.fit(read(source(row["picture"]))) for row in rows]
        return {"pixel_values": tokenizer.normalise(np.stack(pixels))}

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """The number of tasks."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over tasks of what `peftcli.methods.episodes.loss` says of each."""
        weight_E = batch["labels"] != IGNORE
        each = [few_shot.loss(model, one) for one in self.split(self._with_base(bare(model), batch))]
        return Loss((torch.stack(each) * weight_E).sum(), self.weight(batch))

    def split(self, batch: Mapping[str, Tensor]) -> list[Episode]:
        """The tasks of a batch."""
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        found, start = [], 0
        for (support, query), ways in zip(batch["sizes"].tolist(), batch["ways"].tolist(), strict=True):
            at = slice(start, start + support + query)
            classes_N = batch["class"][at]
            base_ND = batch["base"][at] if "base" in batch else None
            part = {name: value[at] for name, value in inputs.items()}
            found.append(Episode(part, classes_N, support, ways, base_ND=base_ND))
            start = at.stop
        return found

    def _with_base(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch with what the base makes of its rows, where the model looks at that."""
        if self._training is None or getattr(model, "base_features", None) is None:
            return batch
        if self._kept is None:
            pool, reader, about = self._training
            self._kept = (kept.features(model, pool.source, lambda rows: self.inputs(rows, reader), about, self.heed),)
        (found,) = self._kept
        return batch if found is None else {**batch, "base": found[batch["place"]]}

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """Accuracy and loss of the query over the split's fixed tasks, by domain; `generate` adds what the report
        shows. `batch_size` does nothing: tasks come one by one."""
        return measure.evaluate(self, bare(model), encoded, tokenizer, device, precision, generate)

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """The likeliest class of each row by the support set that was shown: `{"input", "predicted", "score",
        "probabilities"}`.

        Raises:
            UserError: None was: without one there are no classes.
        """
        if self.known is None:
            raise UserError("a few-shot model needs examples of each class: give it --support FOLDER")
        with measuring(model, device, precision):
            return supports.answer(self, model, rows, tokenizer, batch_size, device)

    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """A task in a line: domain, classes and sizes."""
        pool: Pool = encoded_row["pool"]
        domain, drawn = pool.task(encoded_row["row"])
        said = f"{domain}: {len(drawn.support)} support and {len(drawn.query)} query rows of "
        names = pool.names(domain, drawn)
        return Text(said).append(f"[[{', '.join(names)}]]", style="bold green")


def _named(rows: Rows) -> Iterable[dict[str, Any]]:
    """Rows with the names of their pictures, without their bytes."""
    import pyarrow as pa
    from pyarrow import compute

    names = compute.struct_field(rows.table.column(places.COLUMN), "path").cast(pa.large_string())
    for row, name in zip(rows["row"], names.to_pylist(), strict=True):
        yield {"row": row, places.COLUMN: {"path": name}}
