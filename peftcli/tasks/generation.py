"""Text that follows a prompt. B rows of a batch, L tokens, S supervised positions, V words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

from peftcli.config.errors import Mistake, UserError
from peftcli.data.collate import IGNORE
from peftcli.models.positions import select
from peftcli.tasks import intervals, metrics
from peftcli.tasks.contract import Encoded, Evaluation, Loss, Task, bare, check_metric
from peftcli.tasks.decoding import decode, seed_of
from peftcli.tasks.inference import marked, measuring, to_batch
from peftcli.tasks.layouts import CONVERSATION, Chat, Plain
from peftcli.tasks.loss import cross_entropy_each, cross_entropy_sum
from peftcli.tasks.prompts import Template
from peftcli.tasks.scoring import registry as scorers
from peftcli.tasks.scoring.contract import Answered
from peftcli.tasks.tokens import Tokens, cut_to_fit

LOOKED_AT = 100
"""Training rows whose completions are looked at, and that shots can be taken from."""


class GenerationTask(Task):
    """The completion is learnt, each token from the ones before it; the label of a position is its own token."""

    def __init__(self, config: Any, seed: int = 0):
        super().__init__(config, seed)
        prompt, completion = Template(config.prompt, "task.prompt"), Template(config.completion, "task.completion")
        plain = config.template == "plain"
        self.layout = Plain(prompt, completion) if plain else Chat(prompt, completion, config.system)
        self.scorer = scorers.build(config)
        self.notes = self.scorer.notes
        self.asked = prompt.columns
        self.needed = list(dict.fromkeys([*self.layout.needed, *self.scorer.columns]))
        _check_config(config, prompt, completion, self.scorer.metrics)
        self.best_metric = config.best_metric
        self.higher_is_better = config.best_metric not in metrics.LOWER_IS_BETTER

    def fit(self, splits: Any) -> None:
        """Keep the first training rows as shots, and let the scorer look at the completions.

        Raises:
            UserError: By them, every answer would count as wrong; or there are fewer training rows than shots.
        """
        if CONVERSATION in self.needed:
            return
        rows = list(islice(splits.train, LOOKED_AT))
        texts = [self.layout.completion.render(self.layout.completion.values(row)) for row in rows]
        self.scorer.check(texts)
        if self.config.shots >= max(len(rows), 1) and self.config.shots:
            what = f"task.shots={self.config.shots}, and there are {len(rows)} training rows to take them from"
            raise UserError(Mistake(what, "task.shots", hint=f"at most {min(LOOKED_AT, len(rows)) - 1}"))
        # One more, for the row that is a shot itself and must not see its own answer.
        taken = zip(rows[: self.config.shots + 1], texts, strict=False) if self.config.shots else ()
        self.shots = [self._question(row) + text for row, text in taken]

    def prepare(self, tokens: Tokens) -> None:
        self.layout.check(tokens)

    def encode(self, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        tokens = self.tokens(tokenizer)
        answer = self.layout.answer_ids(row, tokens)
        prompt, cut = self._prompt(row, tokens, self.config.max_length - len(answer)) if answer else (None, False)
        about = json.dumps({name: row[name] for name in self.scorer.columns}, default=str)
        if prompt is None or not answer:
            nothing: dict[str, Any] = {"input_ids": [], "labels": [], "prompt_length": 0, "truncated": 0}
            return {"row": row.get("row", 0), **nothing, "about": about}
        # Nothing comes before the first token that could predict it.
        learnt = [IGNORE, *prompt[1:]] if self.config.train_on_prompt else [IGNORE] * len(prompt)
        return {
            "row": row.get("row", 0),
            "input_ids": prompt + answer,
            "labels": learnt + answer,
            "prompt_length": len(prompt),
            "truncated": int(cut),
            "about": about,
        }

    def _prompt(self, row: Mapping[str, Any], tokens: Tokens, room: int) -> tuple[list[int] | None, bool]:
        values, render = self.layout.prompt(row, tokens)
        before = self._before(row) if self.shots else ""
        return cut_to_fit(tokens, lambda values: self.layout.prompt_ids(before + render(values), tokens), values, room)

    def _question(self, row: Mapping[str, Any]) -> str:
        template = self.layout.prompt_template
        return template.render(template.values(row))

    def _before(self, row: Mapping[str, Any]) -> str:
        """The shots that stand before a row, without one of the same question."""
        question = self._question(row)
        others = [shot for shot in self.shots if not shot.startswith(question)]
        return "".join(f"{shot}\n\n" for shot in others[: self.config.shots])

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
        logits_SV, targets_S, _ = _logits(model, batch)
        return Loss(cross_entropy_sum(logits_SV, targets_S), len(targets_S))

    def evaluate(self, model, encoded, tokenizer, *, batch_size, device, precision="fp32", generate=False):
        """As in the base class; a `best_metric` that needs decoding is measured also without `generate`."""
        totals, weights = [0.0] * len(encoded), [0] * len(encoded)
        with measuring(model, device, precision):
            for picked in encoded.by_length(batch_size):
                logits_SV, targets_S, mask_BL = _logits(model, to_batch(encoded.take(picked), tokenizer, device))
                parts = cross_entropy_each(logits_SV, targets_S).cpu().double().split(mask_BL.sum(1).tolist())
                for i, part in zip(picked, parts, strict=True):
                    totals[i], weights[i] = part.sum().item(), len(part)
        measured = metrics.tokens(sum(totals), sum(weights))
        bounds = {}
        if generate:
            low, high = intervals.of_ratio(totals, weights)
            bounds = {"loss": (low, high), "perplexity": (metrics.perplexity(low), metrics.perplexity(high))}
        if not (generate or self.best_metric not in measured) or not self.config.generated_rows:
            return Evaluation(measured, intervals=bounds)
        count = min(self.config.generated_rows, len(encoded))
        rows = encoded.take([i * len(encoded) // count for i in range(count)])
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        written = self._decode(model, prompts, [row["row"] for row in rows], tokenizer, batch_size, device, precision)
        answers = [row["input_ids"][row["prompt_length"] :] for row in rows]
        expected = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        answered = [
            Answered(json.loads(row["about"]), wanted, texts)
            for row, wanted, texts in zip(rows, expected, written, strict=True)
        ]
        scored = self.scorer.score(answered)
        examples = [
            {
                "row": row["row"],
                "input": tokenizer.decode(prompt, skip_special_tokens=True),
                "expected": one.expected,
                "predicted": _one_or_all(one.written),
                "correct": correct,
                "score": score,
            }
            for row, prompt, one, correct, score in zip(
                rows, prompts, answered, scored.right, scored.scores, strict=True
            )
        ]
        for example, remark in zip(examples, scored.remarks, strict=False):
            example["remark"] = remark
        means = {name: intervals.of_mean(each, name in scored.proportions) for name, each in scored.rows.items()}
        bounds |= {name: (low, high) for name, (low, high) in (means | scored.intervals).items() if low < high}
        return Evaluation({**measured, **scored.metrics}, examples, bounds)

    def _decode(self, model, prompts: list[list[int]], rows: list[int], tokenizer, batch_size, device, precision):
        """Texts to each prompt, in the prompts' order: the likeliest, or `task.samples` drawn ones, `list[list[str]]`.

        A drawn text depends on the run's seed, the row's number and the sample's, not on the batch.
        """
        samples = self.config.samples
        encoded = Encoded.of_prompts([ids for ids in prompts for _ in range(samples)])
        seeds = [seed_of(self.seed, row, sample) for row in rows for sample in range(samples)]
        found = [""] * len(encoded)
        stops = self.layout.stops(self.tokens(tokenizer))
        with measuring(model, device, precision):
            for picked in encoded.by_length(max(1, batch_size // self.config.beams)):
                asked = [prompts[i // samples] for i in picked]
                texts = decode(model, asked, tokenizer, device, self.config, stops, [seeds[i] for i in picked])
                for i, text in zip(picked, texts, strict=True):
                    found[i] = text.strip()
        return [found[at : at + samples] for at in range(0, len(found), samples)]

    def predict(self, model, rows: Iterable[Mapping[str, Any]], tokenizer, *, batch_size, device, precision="fp32"):
        """The text after each row's prompt, or a list of drawn ones: `{"input", "predicted"}`."""
        tokens = self.tokens(tokenizer)
        room = max(self.config.max_length - self.config.max_new_tokens, self.config.max_length // 2)
        prompts = []
        for position, row in enumerate(rows):
            prompt, _ = self._prompt(row, tokens, room)
            if prompt is None:
                what = f"row {position}: the prompt's own words are longer than {room} tokens"
                raise UserError(Mistake(what, "task.prompt", hint="raise task.max_length"))
            prompts.append(prompt)
        numbers = list(range(len(prompts)))
        written = self._decode(model, prompts, numbers, tokenizer, batch_size, device, precision)
        return [
            {"input": tokenizer.decode(ids, skip_special_tokens=True), "predicted": _one_or_all(texts)}
            for ids, texts in zip(prompts, written, strict=True)
        ]

    def protocol(self) -> dict[str, Any]:
        config = self.config
        decoding = "greedy" if config.beams == 1 else f"{config.beams} beams"
        if config.samples > 1:
            drawn = f"temperature {config.temperature:g}, top_p {config.top_p:g}, seed {self.seed}"
            decoding = f"{config.samples} samples, {drawn}"
        return {
            "prompt": config.prompt,
            "template": config.template,
            "shots": config.shots,
            "decoding": decoding,
            "max_new_tokens": config.max_new_tokens,
            "scoring": self.scorer.judged,
        }

    def show(self, encoded_row: Mapping[str, Any], tokenizer: Any) -> Text:
        """The row with its special tokens, what is learnt in marks."""
        shown = Text()
        learnt = [label != IGNORE for label in encoded_row["labels"]]
        for text, is_learnt in marked(encoded_row["input_ids"], learnt, tokenizer):
            shown.append(f"[[{text}]]" if is_learnt else text, style="bold green" if is_learnt else "")
        return shown


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [S, V] at the positions before a supervised token, those tokens [S], and where they are, bool [B, L]."""
    next_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    mask_BL = next_BL != IGNORE
    with select(bare(model), mask_BL):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.reshape(-1, logits.shape[-1]), next_BL[mask_BL], mask_BL


def _one_or_all(texts: list[str]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else texts


def _check_config(config: Any, prompt: Template, completion: Template, measured: Iterable[str]) -> None:
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
    try:
        check_metric(config.best_metric, [*metrics.TOKENS, *measured])
    except UserError as error:
        mistakes += error.mistakes
    else:
        if config.best_metric not in metrics.TOKENS and not config.generated_rows:
            mistakes.append(Mistake(f"task.best_metric={config.best_metric} needs task.generated_rows above 0", "task"))
    if mistakes:
        raise UserError(*mistakes)
