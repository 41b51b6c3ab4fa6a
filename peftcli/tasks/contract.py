"""What a task is to the rest of the house. B rows of a batch, L tokens, S supervised positions, V words."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch.nn.parallel import DistributedDataParallel

from peftcli.config.errors import CheckFailed, Mistake, UserError, unknown
from peftcli.config.schema import ModelConfig
from peftcli.data.collate import IGNORE, MULTIPLE, pad
from peftcli.data.encoded import encode
from peftcli.data.rows import Rows
from peftcli.models import loading
from peftcli.tasks.tokens import Tokens, pad_id

if TYPE_CHECKING:
    from rich.text import Text
    from torch import Tensor, nn

COLUMNS = ("row", "input_ids", "labels", "prompt_length", "about")
"""Columns of an encoded row that batches and measurements read."""
CUT = {"truncated": "cut to the longest length", "dropped": "left out as too long or empty"}
Sizes = tuple[int, int, int]
"""Of a few-shot task: rows of the support, rows of the query, classes."""
ENCODING = 1
"""Raised when `encode` changes, so that rows cached by an older version are not used."""


@dataclass(frozen=True)
class Loss:
    """A sum, so that means weighted by tokens can be formed over micro-batches and processes."""

    total: Tensor
    """fp32 scalar: the loss in nats, summed over the supervised positions."""
    weight: int
    """The number of supervised positions."""


@dataclass(frozen=True)
class Encoded:
    """A split as token ids, without the rows that could not be encoded."""

    rows: Rows
    lengths: list[int]
    """Tokens of each row."""
    counts: dict[str, int]
    """`rows`, `tokens` and `trained_tokens` that are left, rows `truncated` among them, rows `dropped` before."""
    bad: list[Mistake] = field(default_factory=list)
    """What is wrong with rows that only a look inside could find: they are `dropped`, and `data.bad_rows` has a say."""
    kept: list[int] | None = None
    """Positions in the source of the rows that are left; None where all are."""

    @classmethod
    def of_prompts(cls, prompts: list[list[int]]) -> Encoded:
        """Prompts without answers."""
        rows = [{"input_ids": ids, "labels": [IGNORE] * len(ids), "prompt_length": len(ids)} for ids in prompts]
        return cls(Rows.from_list(rows), [len(ids) for ids in prompts], {})

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """The rows at these positions, as `peftcli.data.collate.pad` wants them."""
        return self.rows.take(indices)

    def by_length(self, size: int, among: Iterable[int] | None = None) -> list[list[int]]:
        """Positions in batches of `size` rows of like length, the longest first, so that memory runs out at once."""
        order = sorted(range(len(self)) if among is None else among, key=lambda i: (-self.lengths[i], i))
        return [order[at : at + size] for at in range(0, len(order), size)]


@dataclass(frozen=True)
class Quality:
    """A named row of the quality table."""

    name: str
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of metrics."""


@dataclass(frozen=True)
class Evaluation:
    """A measurement."""

    metrics: dict[str, float]
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Rows, each with row, input, expected, predicted (a list of several samples), correct, score."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of metrics, as far as rows like these allow."""
    answers: dict[str, Any] = field(default_factory=dict)
    """What the report draws of them: `confusion`, `reliability`, `worst`, where the task has them."""


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrapper that averages gradients over processes."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def check_metric(name: str, known: Iterable[str]) -> str:
    """The name itself.

    Raises:
        UserError: The task does not measure it.
    """
    if name not in known:
        raise UserError(unknown("metric", name, known, where="task.best_metric"))
    return name


class Task(ABC):
    """What is learnt from a row.

    Args:
        config: The task's group of the recipe.
        seed: The run's, for answers that are drawn.

    Attributes:
        needed: Columns that the templates name, by their roles.
        asked: Those among them that the model reads; the others hold what it learns, and `predict` does without.
        labels: The label set, known after `fit` or set from a saved run; None for tasks without one.
        several_labels: A row may have several of the labels at once.
        image_size: Side in pixels of the pictures, where the recipe gives one.
        base_answers: The untouched base answers too where nothing is generated: it needs no head.
        unit: What its measurements count: rows, or whole few-shot tasks.
        workers: Threads that make batches ahead of the step; 0 where there is nothing to make.
        repeats: Whether a row gives the model the same input in every epoch.
        notes: What it leaves out of its measurements, and why.
        shots: Training rows as text, to stand before each prompt; known after `fit` or set from a saved run.
        heed: Called between parts of long work before the first step; raises where the run is to stop.
    """

    architecture: Literal["causal-lm", "sequence-classification", "image-classification"] = "causal-lm"
    several_labels: bool = False
    image_size: int | None = None
    unit: Literal["rows", "tasks"] = "rows"
    workers: int = 0
    base_answers: bool = False
    repeats: bool = True
    needed: list[str]
    asked: list[str]
    labels: list[str] | None = None
    notes: tuple[str, ...] = ()
    best_metric: str
    higher_is_better: bool

    def __init__(self, config: Any, seed: int = 0):
        self.config, self.seed = config, seed
        self.shots: list[str] = []
        self.heed: Callable[[], None] = lambda: None
        self._tokens: Tokens | None = None

    def recall(self, lineage: Mapping[str, Any]) -> None:
        """Take from a saved run's lineage what `fit` and `settle` found out."""
        self.labels, self.shots = lineage.get("labels"), lineage.get("shots") or []

    def reader(self, model: ModelConfig) -> Any:
        """What turns rows into numbers: the model's tokenizer, here and below called so also where it reads pictures;
        None where there is none on this machine."""
        return loading.tokenizer(model)

    def tokens(self, tokenizer: Any) -> Tokens:
        """The tokenizer, with what is found out about it once."""
        if self._tokens is None or self._tokens.tokenizer is not tokenizer:
            self._tokens = Tokens(tokenizer)
            self.prepare(self._tokens)
        return self._tokens

    def prepare(self, tokens: Tokens) -> None:
        """Called once for each tokenizer before it encodes anything."""

    @abstractmethod
    def fit(self, splits: Any) -> None:
        """Learn what must be known of the data before anything is encoded, and check the splits against each other."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """A row as the model sees it.

        Returns:
            `row`, `input_ids`, `labels` (-100 where nothing is learnt), `prompt_length` and `truncated` (0 or 1). Empty
            `input_ids` mean that the row has to be left out.
        """

    def encode_split(self, rows: Rows, tokenizer: Any) -> Encoded:
        """Encode a split, or read it from the cache, and count it.

        Raises:
            CheckFailed: `no-trainable-tokens`, where no row has a position to learn.
        """
        tokens = self.tokens(tokenizer)
        about = [ENCODING, asdict(self.config), self.labels, self.shots, tokens.fingerprint]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        found = encode(rows, lambda row: self.encode(row, tokenizer), key)
        lengths, truncated = found.lengths(), found["truncated"]
        kept = [i for i, length in enumerate(lengths) if length]
        trained = sum(label != IGNORE for labels in found["labels"] for label in labels)
        if not trained:
            raise CheckFailed(
                "no-trainable-tokens",
                f"none of {len(lengths)} rows has a token to learn; "
                f"{len(lengths) - len(kept)} were left out as too long or without an answer",
                "look at the rows with `peft data RECIPE`; raise task.max_length or correct task.completion",
            )
        counts = {
            "rows": len(kept),
            "tokens": sum(lengths),
            "trained_tokens": trained,
            "truncated": sum(truncated[i] for i in kept),
            "dropped": len(lengths) - len(kept),
        }
        columns = Rows(found.table.select([name for name in COLUMNS if name in found.column_names]))
        if not counts["dropped"]:
            return Encoded(columns, lengths, counts)
        return Encoded(columns.select(kept), [lengths[i] for i in kept], counts, kept=kept)

    def collate(
        self,
        rows: list[dict[str, Any]],
        tokenizer: Any,
        draw: tuple[int, int] | None = None,
        multiple: int = MULTIPLE,
    ) -> dict[str, Tensor]:
        """Encoded rows as the tensors of a batch, on the CPU.

        Args:
            rows: From `Encoded.take`.
            tokenizer: The model's.
            draw: Seed and epoch of what is drawn at random for training; None draws nothing.
            multiple: The rows' length is rounded up to a multiple of this.
        """
        return pad(rows, pad_id(tokenizer), multiple=multiple)

    def partners(self, batch: list[int], draw: tuple[int, ...]) -> list[int] | None:
        """For each row of an optimiser step the one of it that it is mixed with; None where nothing is mixed.

        Args:
            batch: Positions of the rows, of all processes.
            draw: Seed, epoch, and step in the epoch.
        """
        return None

    def blank(self, rows: int, length: int, device: Any, parts: Sequence[Sizes] = ()) -> dict[str, Tensor]:
        """A batch of this shape without contents, to count with; `parts` are the few-shot tasks that the rows are of,
        where they are of such."""
        import torch

        names = ("input_ids", "attention_mask", "labels")
        return {name: torch.empty(rows, length, dtype=torch.long, device=device) for name in names}

    def told(self, counts: Mapping[str, int]) -> str:
        """`Encoded.counts` in words."""
        parts = [f"{counts['rows']} rows", f"{counts['tokens']:,} tokens", f"{counts['trained_tokens']:,} learnt"]
        return ", ".join(parts + [f"{counts[key]} {word}" for key, word in CUT.items() if counts[key]])

    def classes(self, encoded: Encoded) -> list[int] | None:
        """The class of each row, where the recipe wants as many rows of each in an epoch."""
        return None

    def weight(self, batch: Mapping[str, Tensor]) -> int:
        """The number of supervised positions in a batch, before any model sees it; equal to `loss(...).weight`."""
        return int((batch["labels"] != IGNORE).sum())

    @abstractmethod
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        """The loss on a batch of `peftcli.data.collate.pad`, right-padded, on the model's device.

        Only the supervised positions are multiplied with the vocabulary matrix. The gradient comes once: a second
        backward pass through the same loss raises.
        """

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        encoded: Encoded,
        tokenizer: Any,
        *,
        batch_size: int,
        device: Any,
        precision: str = "fp32",
        generate: bool = False,
    ) -> Evaluation:
        """Measure a model on a split, with dropout off and without gradients; the same numbers every time.

        Args:
            model: The bare model (not wrapped for several processes). Its modules' modes are left as they were.
            encoded: The split.
            tokenizer: The model's.
            batch_size: Rows at once.
            device: Where the model is.
            precision: Arithmetic of the forward pass: fp32, bf16 or fp16.
            generate: Also decode and give examples, which is slow for generation.
        """

    def settle(
        self, model: nn.Module, encoded: Encoded, tokenizer: Any, *, batch_size: int, device: Any, precision: str
    ) -> None:
        """Fix on the validation split what the trained model's answers still need. Arguments as in `evaluate`."""
        return

    def protocol(self) -> dict[str, Any]:
        """How answers are asked for and judged, for whoever reads the numbers; empty where the task's name says it."""
        return {}

    def baselines(self, splits: Any) -> list[Quality]:
        """What can be had without the model, on the test split, or the validation split where there is none."""
        return []

    @abstractmethod
    def predict(
        self,
        model: nn.Module,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        batch_size: int,
        device: Any,
        precision: str = "fp32",
    ) -> list[dict[str, Any]]:
        """Answers to rows that need not hold the right one, in their order: `{"input", "predicted", ...}`."""

    @abstractmethod
    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """An encoded row as text, what is learnt in `[[...]]` and in colour; `.plain` is the text alone."""
