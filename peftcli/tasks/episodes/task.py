"""Few-shot tasks of pictures or texts. E tasks of a batch, N rows of a task, C classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed, Mistake, UserError
from peftcli.config.schema import EpisodesConfig, ImageConfig, ModelConfig
from peftcli.data.collate import IGNORE, MULTIPLE, pad
from peftcli.data.episodes import Rules
from peftcli.data.images import places
from peftcli.data.images.decode import read
from peftcli.data.images.prepared import source, workers
from peftcli.data.rows import Rows
from peftcli.methods import episodes as few_shot
from peftcli.methods.episodes import Episode
from peftcli.models import image_reader
from peftcli.tasks.contract import Encoded, Loss, Task, bare, check_metric
from peftcli.tasks.episodes import measure
from peftcli.tasks.episodes.pool import Pool, gather
from peftcli.tasks.images.gallery import hang
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit, pad_id

INPUTS = ("pixel_values", "input_ids", "attention_mask")
"""Names of a model's inputs among the tensors of a batch."""


class EpisodesTask(Task):
    """Tells a task's classes apart by the mean feature of each; what is trained are the features."""

    base_answers = True

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
        self.rules = Rules(config.ways, config.support, config.class_support, config.queries)

    def reader(self, model: ModelConfig) -> Any:
        return image_reader.find(model, self.image_size) if self.pictures else super().reader(model)

    def fit(self, splits: Any) -> None:
        """Check that no class of a domain is in two splits.

        Raises:
            CheckFailed: `label-mismatch`: a class is trained on and measured.
        """
        seen: dict[tuple[str, str], str] = {}
        for split in ("train", "validation", "test"):
            rows = getattr(splits, split)
            for key in set(zip(rows["domain"], rows["label"], strict=True)) if rows is not None else ():
                if seen.setdefault(key, split) != split:
                    what = f"class {key[1]!r} of {key[0]} is in {seen[key]} and in {split}"
                    raise CheckFailed("label-mismatch", what, "each class belongs to one split")

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
        return gather(rows, self._encoded(rows, tokenizer), self.rules, key, fixed, self.config.episodes)

    def _encoded(self, rows: Rows, tokenizer: Any) -> Encoded:
        if self.pictures:
            bare_rows = [self.encode(row, tokenizer) for row in _named(rows)]
            return hang(rows, bare_rows, tokenizer, originals=False, animated=ImageConfig().animated)
        found = [self.encode(row, tokenizer) for row in rows]
        lengths = [len(row["input_ids"]) for row in found]
        counts = {"rows": len(found), "dropped": 0, "truncated": sum(row["truncated"] for row in found)}
        return Encoded(Rows.from_list(found), lengths, counts)

    def told(self, counts: Mapping[str, int]) -> str:
        """`Pool.counts` in words."""
        things = "pictures" if self.pictures else "texts"
        parts = [f"{counts['rows']} {things} of {counts['classes']} classes in {counts['domains']} domains"]
        parts += [f"{counts['episodes']} tasks"]
        return ", ".join(parts + [f"{n} {what}" for what in ("dropped", "truncated") if (n := counts.get(what))])

    def collate(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        draw: tuple[int, int] | None = None,
        multiple: int = MULTIPLE,
    ) -> dict[str, Tensor]:
        """Tasks one after another: the model's inputs [all rows, ...]; `task` and `class`, int64 of each row, and
        `query`, 0 or 1; `place`, each row's in its split; and of each task `labels` [E], the number of its domain."""
        parts: dict[str, list[Any]] = {"task": [], "class": [], "query": [], "place": [], "labels": []}
        taken: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            pool: Pool = row["pool"]
            domain, drawn = pool.task(row["row"], draw)
            chosen = np.concatenate([drawn.support, drawn.query])
            taken += pool.source.take(chosen.tolist())
            parts["task"] += [number] * len(chosen)
            parts["class"] += [*drawn.support_classes.tolist(), *drawn.query_classes.tolist()]
            parts["query"] += [0] * len(drawn.support) + [1] * len(drawn.query)
            parts["place"] += chosen.tolist()
            parts["labels"].append(pool.domains.index(domain))
        tensors = {name: torch.tensor(values) for name, values in parts.items()}
        return {**self.inputs(taken, tokenizer, multiple), **tensors}

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

    def blank(self, rows: int, length: int, device: Any) -> dict[str, Tensor]:
        """`rows` tasks of the largest size that the rules allow."""
        ways = self.config.ways[1]
        count = self.config.support + ways * self.config.queries
        names: dict[str, Tensor] = {
            "pixel_values": torch.empty(rows * count, 3, length, length, device=device)
        } if self.pictures else {
            name: torch.empty(rows * count, length, dtype=torch.long, device=device) for name in INPUTS[1:]
        }  # fmt: skip
        at = torch.arange(rows * count)
        inside = at % count
        parts = {"task": at // count, "class": inside % ways, "query": (inside >= self.config.support).long(),
                 "place": at, "labels": torch.zeros(rows, dtype=torch.long)}  # fmt: skip
        return {**names, **parts}

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """The number of tasks."""
        return int((batch["labels"] != IGNORE).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The sum over tasks of what `peftcli.methods.episodes.loss` says of each."""
        weight_E = batch["labels"] != IGNORE
        each = [few_shot.loss(model, one) for one in self.split(batch)]
        return Loss((torch.stack(each) * weight_E).sum(), self.weight(batch))

    def split(self, batch: Mapping[str, Tensor]) -> list[Episode]:
        """The tasks of a batch."""
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        task_N, class_N, query_N = batch["task"], batch["class"], batch["query"].bool()
        found, start = [], 0
        for size in torch.bincount(task_N).tolist():
            at = slice(start, start + size)
            part = {name: value[at] for name, value in inputs.items()}
            base_ND = batch["base"][at] if "base" in batch else None
            found.append(Episode(part, class_N[at], query_N[at], int(class_N[at].max()) + 1, base_ND=base_ND))
            start += size
        return found

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """Accuracy and loss of the query over the split's fixed tasks, by domain; `generate` adds what the report
        shows. `batch_size` does nothing: tasks come one by one."""
        return measure.evaluate(self, bare(model), encoded, tokenizer, device, precision, generate)

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """Refused: without a support set there are no classes.

        Raises:
            UserError: Always.
        """
        raise UserError("a few-shot model needs examples of each class: give it --support FOLDER")

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

