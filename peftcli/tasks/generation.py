"""Text that follows a prompt. B rows of a batch, L tokens, S supervised positions, V words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.data.collate import IGNORE
from peftcli.models.positions import select
from peftcli.tasks import metrics
from peftcli.tasks.contract import Encoded, Evaluation, Loss, Task, bare, check_metric
from peftcli.tasks.inference import decode_greedily, marked, measuring, to_batch
from peftcli.tasks.layouts import CONVERSATION, Chat, Plain
from peftcli.tasks.loss import cross_entropy_sum
from peftcli.tasks.prompts import Template
from peftcli.tasks.tokens import Tokens, cut_to_fit


class GenerationTask(Task):
    """The completion is learnt, each token from the ones before it; the label of a position is its own token."""

    def __init__(self, config: Any):
        super().__init__(config)
        prompt, completion = Template(config.prompt, "task.prompt"), Template(config.completion, "task.completion")
        plain = config.template == "plain"
        self.layout = Plain(prompt, completion) if plain else Chat(prompt, completion, config.system)
        self.asked, self.needed = prompt.columns, self.layout.needed
        _check_config(config, prompt, completion)
        self.best_metric = config.best_metric
        self.higher_is_better = config.best_metric not in metrics.LOWER_IS_BETTER

    def fit(self, splits: Any) -> None:
        """Try `task.answer` on the first training rows.

        Raises:
            UserError: It matches none of them, so that every answer would count as wrong.
        """
        if self.config.answer is None or CONVERSATION in self.needed:
            return
        rows = list(islice(splits.train, 100))
        texts = [self.layout.completion.render(self.layout.completion.values(row)) for row in rows]
        if texts and all(metrics.answer(self.config.answer, text) is None for text in texts):
            raise UserError(
                Mistake(
                    f"task.answer={self.config.answer!r} matches none of the first {len(texts)} completions",
                    hint=f"the first one ends in {texts[0][-60:]!r}",
                )
            )

    def prepare(self, tokens: Tokens) -> None:
        self.layout.check(tokens)

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        tokens = self.tokens(tokenizer)
        answer = self.layout.answer_ids(row, tokens)
        prompt, cut = self._prompt(row, tokens, self.config.max_length - len(answer)) if answer else (None, False)
        if prompt is None or not answer:
            return {"row": row.get("row", 0), "input_ids": [], "labels": [], "prompt_length": 0, "truncated": 0}
        # Nothing comes before the first token that could predict it.
        learnt = [IGNORE, *prompt[1:]] if self.config.train_on_prompt else [IGNORE] * len(prompt)
        return {
            "row": row.get("row", 0),
            "input_ids": prompt + answer,
            "labels": learnt + answer,
            "prompt_length": len(prompt),
            "truncated": int(cut),
        }

    def _prompt(self, row: Mapping[str, Any], tokens: Tokens, room: int) -> tuple[list[int] | None, bool]:
        values, render = self.layout.prompt(row, tokens)
        return cut_to_fit(tokens, lambda values: self.layout.prompt_ids(render(values), tokens), values, room)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        next_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        mask_BL = next_BL != IGNORE
        targets_S = next_BL[mask_BL]
        with select(bare(model), mask_BL):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return Loss(cross_entropy_sum(logits.reshape(-1, logits.shape[-1]), targets_S), len(targets_S))

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """As in the base class; a `best_metric` that needs decoding is measured also without `generate`."""
        total, weight = 0.0, 0
        with measuring(model, device, precision):
            for picked in encoded.by_length(batch_size):
                loss = self.loss(model, to_batch(encoded.take(picked), tokenizer, device))
                total, weight = total + loss.total.item(), weight + loss.weight
        measured = metrics.tokens(total, weight)
        if not (generate or self.best_metric not in measured) or not self.config.generated_rows:
            return Evaluation(measured)
        count = min(self.config.generated_rows, len(encoded))
        rows = encoded.take([i * len(encoded) // count for i in range(count)])
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        predicted = self._decode(model, prompts, tokenizer, batch_size, device, precision)
        answers = [row["input_ids"][row["prompt_length"] :] for row in rows]
        expected = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        texts, scores, right = self._score(predicted, expected)
        examples = [
            {
                "row": row["row"],
                "input": tokenizer.decode(prompt, skip_special_tokens=True),
                "expected": wanted,
                "predicted": text,
                "correct": correct,
                "score": score,
            }
            for row, prompt, wanted, text, correct, score in zip(
                rows, prompts, expected, predicted, right, scores, strict=True
            )
        ]
        return Evaluation({**measured, **texts}, examples)

    def _score(self, predicted: list[str], expected: list[str]) -> tuple[dict[str, float], list[float], list[bool]]:
        """Metrics of generated texts, ROUGE-L of each, and whether each is right."""
        scores = metrics.rouge_l(predicted, expected)
        same = right = [text == wanted for text, wanted in zip(predicted, expected, strict=True)]
        found = {
            "rouge_l": sum(scores) / len(scores),
            "bleu": metrics.bleu(predicted, expected),
            "exact_match": sum(same) / len(same),
        }
        if pattern := self.config.answer:
            right = [
                metrics.same_answer(metrics.answer(pattern, text), metrics.answer(pattern, wanted))
                for text, wanted in zip(predicted, expected, strict=True)
            ]
            found["answer_accuracy"] = sum(right) / len(right)
        return found, scores, right

    def _decode(self, model, prompts: list[list[int]], tokenizer, batch_size, device, precision) -> list[str]:
        """Greedy answers in the order of the prompts."""
        encoded = Encoded.of_prompts(prompts)
        found = [""] * len(prompts)
        stops = self.layout.stops(self.tokens(tokenizer))
        with measuring(model, device, precision):
            for picked in encoded.by_length(batch_size):
                texts = decode_greedily(
                    model, [prompts[i] for i in picked], tokenizer, device, self.config.max_new_tokens, stops
                )
                for i, text in zip(picked, texts, strict=True):
                    found[i] = text.strip()
        return found

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """The text after each row's prompt: `{"input", "predicted"}`."""
        tokens = self.tokens(tokenizer)
        room = max(self.config.max_length - self.config.max_new_tokens, self.config.max_length // 2)
        prompts = []
        for position, row in enumerate(rows):
            prompt, _ = self._prompt(row, tokens, room)
            if prompt is None:
                what = f"row {position}: the prompt's own words are longer than {room} tokens"
                raise UserError(Mistake(what, "task.prompt", hint="raise task.max_length"))
            prompts.append(prompt)
        texts = self._decode(model, prompts, tokenizer, batch_size, device, precision)
        return [
            {"input": tokenizer.decode(ids, skip_special_tokens=True), "predicted": text}
            for ids, text in zip(prompts, texts, strict=True)
        ]

    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """The row with its special tokens, what is learnt in marks."""
        shown = Text()
        learnt = [label != IGNORE for label in encoded_row["labels"]]
        for text, is_learnt in marked(encoded_row["input_ids"], learnt, tokenizer):
            shown.append(f"[[{text}]]" if is_learnt else text, style="bold green" if is_learnt else "")
        return shown


def _check_config(config: Any, prompt: Template, completion: Template) -> None:
    """Refuse settings that cannot go together.

    Raises:
        UserError: All of them.
    """
    mistakes = []
    if CONVERSATION in prompt.columns and (config.template == "plain" or prompt.text.strip() != f"{{{CONVERSATION}}}"):
        what = "conversations go with task.template=chat and task.prompt={messages} alone"
        mistakes.append(Mistake(what, "task.prompt"))
    elif not completion.columns and CONVERSATION not in prompt.columns:
        mistakes.append(Mistake(f"task.completion={config.completion!r} names no column", "task.completion"))
    if config.template == "plain" and config.system is not None:
        mistakes.append(Mistake("a system message goes with task.template=chat only", "task.system"))
    known = [*metrics.TOKENS, *metrics.TEXTS, *(["answer_accuracy"] if config.answer else [])]
    try:
        check_metric(config.best_metric, known)
    except UserError as error:
        mistakes += error.mistakes
    else:
        if config.best_metric not in metrics.TOKENS and not config.generated_rows:
            mistakes.append(Mistake(f"task.best_metric={config.best_metric} needs task.generated_rows above 0", "task"))
    try:
        if config.answer is not None and not re.compile(config.answer).groups:
            what = f"task.answer={config.answer!r} has no group"
            mistakes.append(Mistake(what, "task.answer", hint="put ( ) around the answer"))
    except re.error as error:
        mistakes.append(Mistake(f"task.answer={config.answer!r} is no regular expression: {error}", "task.answer"))
    if mistakes:
        raise UserError(*mistakes)
