"""One label a row of text. B rows of a batch, C classes, L tokens, V words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import CheckFailed, Mistake, UserError, unknown
from peftcli.data.collate import IGNORE
from peftcli.data.rows import Rows
from peftcli.models.positions import select
from peftcli.tasks import baselines, intervals, labels, metrics
from peftcli.tasks.contract import Encoded, Evaluation, Loss, Quality, Task, bare, check_metric
from peftcli.tasks.inference import marked, measuring, to_batch
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit

LISTED = 5
"""Labels that a message names at most."""


class ClassificationTask(Task):
    """Label words scored by the language model after the prompt, or a linear head on the prompt's last position.

    Either way the class stands as the label of the row's last token, and nowhere else.
    """

    def __init__(self, config: Any, seed: int = 0):
        super().__init__(config, seed)
        self.template = Template(config.prompt, "task.prompt")
        if not self.template.columns:
            raise UserError(Mistake(f"task.prompt={config.prompt!r} names no column", hint="write {text} for the text"))
        self.asked = self.template.columns
        self.needed = [*self.asked, "label"]
        self.architecture = "causal-lm" if config.head == "label_words" else "sequence-classification"
        self.best_metric = check_metric(config.best_metric, metrics.CLASSIFICATION)
        self.higher_is_better = config.best_metric not in metrics.LOWER_IS_BETTER
        self.words: list[int] = []
        """First token of each label's word."""

    def fit(self, splits: Any) -> None:
        """Take the label set from the training rows; `task.labels` may add to those that a stream begins with.

        Raises:
            CheckFailed: `label-mismatch`: fewer than two labels, or one that only other splits have.
            UserError: `task.labels` names a label that the training rows do not have.
        """
        seen = labels.count(splits.train)
        if not isinstance(splits.train, Rows):
            seen.update(list(self.config.labels))
        if strange := [name for name in self.config.labels if name not in seen]:
            raise UserError(*_strange(strange, seen))
        self.labels = labels.learn(splits, seen)
        self._tokens = None

    def prepare(self, tokens: Tokens) -> None:
        if self.config.head == "label_words" and self.labels is not None:
            self.words = self._label_words(tokens)

    @property
    def _classes(self) -> list[str]:
        assert self.labels is not None, "fit() comes first, or labels from a saved run"
        return self.labels

    def _label_words(self, tokens: Tokens) -> list[int]:
        """First token of each label's word, as it follows the prompt: after a space, else right after it."""
        words = [self.config.labels.get(label, label) for label in self._classes]
        anchor = self.template.render(dict.fromkeys(self.template.columns, "x"))
        prompt = anchor.rstrip(" ")
        gaps = [anchor[len(prompt) :]] if anchor[-1:].isspace() else [" ", ""]
        tried = []
        for gap in gaps:
            firsts = [tokens.continuation(prompt, gap + word)[:1] for word in words]
            if len({tuple(first) for first in firsts if first}) == len(words):
                return [first[0] for first in firsts]
            tried.append(firsts)
        raise UserError(*_collisions(self._classes, tried[0], tokens))

    def shortened(self, tokenizer: Any) -> dict[str, str]:
        """Each label whose word is longer than the first token it is scored by, and that token's text."""
        self.tokens(tokenizer)
        firsts = {
            label: tokenizer.decode([first]).strip() for label, first in zip(self._classes, self.words, strict=False)
        }
        return {
            label: first for label, first in firsts.items() if first != self.config.labels.get(label, label).strip()
        }

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        tokens = self.tokens(tokenizer)
        ids, cut = self._prompt(row, tokens)
        label = str(row["label"])
        if label not in self._classes:
            known = ", ".join(self._classes)
            raise CheckFailed("label-mismatch", f"row {row.get('row')} has label {label!r}, known labels are: {known}")
        targets = [IGNORE] * (len(ids) - 1) + [self._classes.index(label)]
        return {
            "row": row.get("row", 0),
            "input_ids": ids,
            "labels": targets,
            "prompt_length": len(ids),
            "truncated": int(cut),
        }

    def _prompt(self, row: Mapping[str, Any], tokens: Tokens) -> tuple[list[int], bool]:
        """The prompt's tokens, its texts cut at their ends where it is too long, and whether they were."""
        values = {name: value.strip() for name, value in self.template.values(row).items()}

        def render(values: dict[str, str]) -> list[int]:
            # A space at the end would be a token of its own; it belongs to the label word.
            return tokens.start + tokens.ids(self.template.render(values).rstrip(" "))

        room = self.config.max_length
        ids, cut = cut_to_fit(tokens, render, values, room)
        if ids is None:
            raise UserError(Mistake(f"the prompt's own words are longer than task.max_length={room}", "task.prompt"))
        if not ids:
            raise CheckFailed("no-trainable-tokens", f"row {row.get('row')} is empty: {dict(row)}")
        return ids, cut

    def _scores(self, model: nn.Module, batch: Mapping[str, Tensor], mask_BL: Tensor) -> Tensor:
        """Scores of the classes, fp32 [rows with a true mask, C]."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if self.architecture == "sequence-classification":
            return _wide(model(**inputs).logits[mask_BL.any(1)])
        with select(bare(model), mask_BL):
            logits = model(**inputs).logits
        return _wide(logits.reshape(-1, logits.shape[-1])[:, self.words])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        mask_BL = batch["labels"] != IGNORE
        targets = batch["labels"][mask_BL]
        return Loss(F.cross_entropy(self._scores(model, batch, mask_BL), targets, reduction="sum"), len(targets))

    def _log_probabilities(self, model, encoded, tokenizer, batch_size, device, precision) -> Tensor:
        """Log-probabilities of the classes on CPU, fp32 [rows of `encoded`, C], in its order."""
        found = torch.zeros(len(encoded), len(self._classes))
        with measuring(model, device, precision):
            for picked in encoded.by_length(batch_size):
                batch = to_batch(encoded.take(picked), tokenizer, device)
                last_BL = batch["attention_mask"].bool()
                last_BL = last_BL & ~F.pad(last_BL[:, 1:], (0, 1))
                found[picked] = self._scores(model, batch, last_BL).log_softmax(1).cpu().float()
        return found

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """As in the base class; `generate` costs nothing here and gives all rows as examples."""
        self.tokens(tokenizer)
        scores = self._log_probabilities(model, encoded, tokenizer, batch_size, device, precision)
        targets = torch.tensor([labels[-1] for labels in encoded.rows["labels"]])
        measured = metrics.classification(scores, targets)
        if not generate:
            return Evaluation(measured)
        best = scores.max(1)
        answers = zip(encoded.rows, targets.tolist(), best.indices.tolist(), best.values.exp().tolist(), strict=True)
        return Evaluation(
            measured,
            [
                {
                    "row": row["row"],
                    "input": tokenizer.decode(row["input_ids"], skip_special_tokens=True),
                    "expected": self._classes[target],
                    "predicted": self._classes[guess],
                    "correct": guess == target,
                    "score": score,
                }
                for row, target, guess, score in answers
            ],
            {"accuracy": intervals.wilson(measured["accuracy"], len(encoded))},
        )

    def baselines(self, splits: Any) -> list[Quality]:
        return baselines.classification(splits, self.template, self._classes)

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """The likeliest label of each row: `{"input", "predicted", "score", "probabilities"}`."""
        tokens = self.tokens(tokenizer)
        prompts = [self._prompt(row, tokens)[0] for row in rows]
        encoded = Encoded.of_prompts(prompts)
        scores = self._log_probabilities(model, encoded, tokenizer, batch_size, device, precision).exp()
        return [
            {
                "input": tokenizer.decode(ids, skip_special_tokens=True),
                "predicted": self._classes[int(score_C.argmax())],
                "score": float(score_C.max()),
                "probabilities": dict(zip(self._classes, score_C.tolist(), strict=True)),
            }
            for ids, score_C in zip(prompts, scores, strict=True)
        ]

    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """The prompt, and in marks the word that is learnt after it (the label itself with a linear head)."""
        self.tokens(tokenizer)
        ids, target = encoded_row["input_ids"], encoded_row["labels"][-1]
        shown = Text("".join(text for text, _ in marked(ids, [False] * len(ids), tokenizer)))
        answer = tokenizer.decode([self.words[target]]) if self.words else f" {self._classes[target]}"
        return shown.append(f"[[{answer}]]", style="bold green")


def _collisions(labels: list[str], firsts: list[list[int]], tokens: Tokens) -> list[Mistake]:
    """One mistake for each first token that several labels share, or that a label lacks."""
    shared: dict[tuple[int, ...], list[str]] = {}
    for label, first in zip(labels, firsts, strict=True):
        shared.setdefault(tuple(first), []).append(label)
    return [
        Mistake(
            f"labels {', '.join(map(repr, same))} "
            + (f"begin with the same token {tokens.tokenizer.decode(list(first))!r}" if first else "have no token"),
            "task.labels",
            hint=f"give words that begin differently: task.labels.{same[-1]}=WORD, or take task.head=linear",
        )
        for first, same in shared.items()
        if len(same) > 1 or not first
    ]


def _wide(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def _strange(names: list[str], seen: Iterable[str]) -> list[Mistake]:
    """Labels that no training row has: each with its neighbours, or where they are many, that the rows are few."""
    if len(names) <= LISTED:
        return [unknown("label", name, seen, where="task.labels") for name in names]
    what = f"no training row has {len(names)} of these labels: {', '.join(names[:LISTED])}, ..."
    hint = "take more training rows (data.rows.train), so that each label is among them, or name other labels"
    return [Mistake(what, "task.labels", hint=hint)]
