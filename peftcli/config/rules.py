"""What types cannot say: ranges of single values, and values that do not go together. Two tables, checked at once."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from peftcli.config import paths, peft_types, sample_kinds
from peftcli.config.errors import Mistake, nearest, unknown
from peftcli.config.schema import SCHEMA_VERSION
from peftcli.config.validate import SCHEMA_DEFAULT, UNREADABLE, Checked

SPLITS = ("train", "validation", "test")
METRICS = {
    "classification": ("accuracy", "f1_macro", "balanced_accuracy", "loss"),
    "generation": ("loss", "perplexity", "rouge_l", "bleu", "exact_match", "answer_accuracy"),
}

_TINY = 5e-324  # the smallest number above zero: "more than 0"
RANGES: dict[str, tuple[float, float]] = {
    "data.validation_share": (0, 1 - 1e-9),
    "data.test_share": (0, 1 - 1e-9),
    "task.max_length": (1, inf),
    "task.max_new_tokens": (1, inf),
    "task.generated_rows": (0, inf),
    "optim.lr": (_TINY, inf),
    "optim.weight_decay": (0, inf),
    "optim.eps": (_TINY, inf),
    "optim.betas": (0, 1 - 1e-9),
    "optim.warmup_share": (0, 1),
    "optim.final_share": (0, 1),
    "optim.clip_norm": (_TINY, inf),
    "training.epochs": (_TINY, inf),
    "training.max_steps": (1, inf),
    "training.batch_size": (1, inf),
    "training.batch_tokens": (1, inf),
    "training.micro_batch_size": (1, inf),
    "training.eval_every": (1, inf),
    "training.eval_batch_size": (1, inf),
    "training.early_stopping": (1, inf),
    "training.log_every": (1, inf),
    "training.save_every": (1, inf),
    "training.keep_checkpoints": (1, inf),
    "training.merge_tolerance": (_TINY, inf),
    "launch.processes": (1, inf),
    "launch.threads": (1, inf),
    "launch.timeout_minutes": (_TINY, inf),
    "method.r": (1, inf),
    "method.alpha": (_TINY, inf),
    "method.dropout": (0, 1 - 1e-9),
    "method.head_first": (0, 1 - 1e-9),
    "method.score_share": (_TINY, 1),
    "method.calibration_batches": (1, inf),
    "method.rank": (1, inf),
    "method.energy": (_TINY, 1),
    "method.budget": (1, inf),
    "method.min_rank": (1, inf),
    "method.max_rank": (1, inf),
    "method.loss_increase": (0, 1 - 1e-9),
    "method.iterations": (1, inf),
    "seed": (0, 2**32 - 1),
    "data.seed": (0, 2**32 - 1),
}
"""Lowest and highest value of a number, or of each number in a list."""
AMOUNTS = {"method.channels": 1, "method.states": 1, "method.pruned": 0, "method.warmup": 1}
"""Lowest count where a whole number is a count and any other number a share; a share is above 0 and at most 1."""


@dataclass(frozen=True)
class Rule:
    """Values that do not go together.

    Attributes:
        reads: Dotted keys; the first that was written down is where the message points.
        broken: Called with the values of `reads`; true where they conflict.
        what: The message.
        hint: What to change.
    """

    reads: tuple[str, ...]
    broken: Callable[..., bool]
    what: str
    hint: str = ""


RULES = (
    Rule(
        ("data.streaming", "training.max_steps"),
        lambda streaming, steps: streaming and steps is None,
        "data.streaming needs training.max_steps: the number of rows is not known beforehand",
        "add training.max_steps=1000, or data.streaming=false",
    ),
    Rule(
        ("data.streaming", "training.group_by_length"),
        lambda streaming, grouped: streaming and grouped,
        "data.streaming and training.group_by_length do not go together: lengths are not known beforehand",
        "add training.group_by_length=false",
    ),
    Rule(
        ("data.source", "data.files"),
        lambda source, files: source == "files" and not files.get("train"),
        "data.source is files, but data.files names no file of the train split",
        "for example data.files.train=rows.jsonl",
    ),
    Rule(
        ("data.files", "data.source"),
        lambda files, source: bool(files) and source != "files",
        "data.files is given, but data.source is not files",
        "add data.source=files, or remove data.files",
    ),
    Rule(
        ("data.source", "data.name"),
        lambda source, name: source in ("hub", "sample", "bundled") and not name,
        "data.name is missing: a hub id, or the name of a sample or of bundled rows",
        "peft samples list names the samples, peft ls data what is bundled",
    ),
    Rule(
        ("data.subset", "data.source"),
        lambda subset, source: subset is not None and source != "hub",
        "data.subset only means something with data.source=hub",
        "remove data.subset",
    ),
    Rule(
        ("data.validation_share", "data.test_share"),
        lambda validation, test: validation < 1 and test < 1 and validation + test >= 1,
        "data.validation_share and data.test_share leave no training rows",
        "together they must stay below 1",
    ),
    Rule(("model.name",), lambda name: not name, "model.name is empty"),
    Rule(
        ("model.weights", "model.source", "model.shape"),
        lambda weights, source, shape: weights == "random" and source == "hub" and not shape,
        "model.weights=random needs the shape of the model: model.shape, or a model in a folder, a sample or bundled",
        "choose a model that has one, such as model=smollm2-135m",
    ),
    Rule(
        ("model.shape",),
        lambda shape: bool(shape) and "model_type" not in shape,
        "model.shape has no model_type",
        "for example model_type: llama",
    ),
    Rule(
        ("model.revision", "model.source"),
        lambda revision, source: revision is not None and source != "hub",
        "model.revision only means something with model.source=hub",
        "remove model.revision",
    ),
    Rule(
        ("method.name", "task.type", "task.head"),
        lambda method, task, head: method == "linear_probe" and (task != "classification" or head != "linear"),
        "method linear_probe trains a linear head, and this task has none",
        "use a classification task with task.head=linear",
    ),
    Rule(
        ("method.dropout", "method.lora_targets"),
        lambda dropout, targets: dropout > 0 and not targets,
        "method.dropout drops inputs of LoRA, and method.lora_targets is empty",
        "add method.dropout=0, or name a projection: method.lora_targets=[ssm.out]",
    ),
    Rule(
        ("method.selector", "method.channels", "method.states"),
        lambda selector, *amounts: selector == "random" and "auto" in amounts,
        "method.selector is random, and auto asks for a share of a score that means nothing there",
        "give method.channels and method.states counts or shares",
    ),
    Rule(
        ("method.channels", "method.pruned"),
        lambda *amounts: all(isinstance(one, float) and one <= 1 for one in amounts) and sum(amounts) > 1,
        "method.channels and method.pruned are together more than all channels",
        "a channel is trained or pruned, not both",
    ),
    Rule(
        ("method.warmup",),
        lambda warmup: isinstance(warmup, float) and warmup == 1,
        "method.warmup takes all steps, and leaves none to train what it selects",
        "for a single step write method.warmup=1",
    ),
    Rule(
        ("method.energy", "method.rank"),
        lambda energy, rank: energy is not None and rank != "auto",
        "method.energy chooses ranks, and method.rank is a number",
        "add method.rank=auto, or method.energy=null",
    ),
    Rule(
        ("method.budget", "method.rank"),
        lambda budget, rank: budget is not None and rank != "auto",
        "method.budget chooses ranks, and method.rank is a number",
        "add method.rank=auto, or method.budget=null",
    ),
    Rule(
        ("method.min_rank", "method.max_rank"),
        lambda least, most: least > most,
        "method.min_rank is larger than method.max_rank",
        "leave room between them, or make them equal",
    ),
    Rule(
        ("method.source", "method.tuned"),
        lambda source, tuned: source == "delta" and not tuned,
        "method.source is delta, and method.tuned does not say where the fine-tuned model is",
        "for example method.tuned=runs/NAME/model, of a run of method=full",
    ),
    Rule(
        ("method.tuned", "method.source"),
        lambda tuned, source: bool(tuned) and source != "delta",
        "method.tuned only means something with method.source=delta",
        "add method.source=delta, or remove method.tuned",
    ),
    Rule(
        ("training.micro_batch_size", "training.batch_size", "training.batch_tokens"),
        lambda micro, batch, tokens: micro is not None and tokens is None and micro > batch,
        "training.micro_batch_size is larger than training.batch_size",
        "a micro batch is a part of a batch",
    ),
    Rule(
        ("training.early_stopping", "training.eval_every"),
        lambda patience, every: patience is not None and every == "end",
        "training.early_stopping needs measurements before the end",
        "add training.eval_every=epoch",
    ),
    Rule(
        ("task.best_metric", "task.generated_rows"),
        lambda metric, rows: metric in METRICS["generation"][2:] and rows == 0,
        "task.best_metric is measured on generated rows, and task.generated_rows is 0",
        "add task.generated_rows=32, or task.best_metric=loss",
    ),
    Rule(
        ("task.best_metric", "task.answer"),
        lambda metric, answer: metric == "answer_accuracy" and answer is None,
        "task.best_metric is answer_accuracy, and task.answer does not say what an answer is",
        "give task.answer a regular expression with one group",
    ),
    Rule(
        ("task.system", "task.template"),
        lambda system, template: system is not None and template != "chat",
        "task.system only means something with task.template=chat",
        "add task.template=chat, or remove task.system",
    ),
)


def conflicts(checked: Checked) -> list[Mistake]:
    """Every broken range and rule; a value that is already known to be a mistake breaks none."""
    where = _Where(checked)
    found = [*_ranges(where), *_amounts(where), *_rules(where), *_version(where), *_splits(where), *_texts(where)]
    return [*found, *_columns(where), *_metric(where), *_peft(where), *_samples(where), *_bundled(where)]


class _Where:
    """Values of a checked run by their dotted keys, and where they were written."""

    def __init__(self, checked: Checked):
        self.config, self.origins = checked.config, checked.origins

    def get(self, key: str) -> Any:
        """The value, or `UNREADABLE` where it is a mistake or the chosen method or task has no such key."""
        value: Any = self.config
        for part in key.split("."):
            value = getattr(value, part, UNREADABLE)
        return value

    def of(self, *keys: str) -> str:
        """Where the first of the keys was written that was written at all."""
        written = [self.origins[key] for key in keys if self.origins.get(key, SCHEMA_DEFAULT) != SCHEMA_DEFAULT]
        return written[0] if written else ""


def _ranges(where: _Where) -> Iterator[Mistake]:
    for key, (low, high) in RANGES.items():
        value = where.get(key)
        for number in value if isinstance(value, tuple) else (value,):
            is_number = isinstance(number, int | float) and not isinstance(number, bool)
            if is_number and not (low <= number <= high and isfinite(number)):
                yield Mistake(f"{key} is {number}, expected {_range(low, high)}", where.of(key))
    rows = where.get("data.rows")
    for split, number in rows.items() if isinstance(rows, dict) else ():
        if isinstance(number, int) and number < 1:
            yield Mistake(
                f"data.rows.{split} is {number}, expected 1 or more", where.of(f"data.rows.{split}", "data.rows")
            )


def _amounts(where: _Where) -> Iterator[Mistake]:
    for key, least in AMOUNTS.items():
        value = where.get(key)
        if not isinstance(value, int | float):
            continue
        fits = value >= least if isinstance(value, int) else 0 < value <= 1 or value == least == 0
        if not fits:
            what = f"{key} is {value}, expected a count ({least} or more) or a share (above 0, up to 1.0 for all)"
            yield Mistake(what, where.of(key))


def _range(low: float, high: float) -> str:
    least = "more than 0" if low == _TINY else f"{low:g} or more"
    if high == inf:
        return least
    below = "below 1" if high == 1 - 1e-9 else f"{int(high)}"
    if low == _TINY:
        return f"{least} and at most {high:g}"
    return f"{low:g} to {below}" if high != 1 - 1e-9 else f"{least} and {below}"


def _rules(where: _Where) -> Iterator[Mistake]:
    for rule in RULES:
        values = [where.get(key) for key in rule.reads]
        optional = rule.reads[0] == "method.name"  # a generation task has no head, and that is the conflict
        if all(value is not UNREADABLE for value in (values[:2] if optional else values)) and rule.broken(*values):
            yield Mistake(rule.what, where.of(*rule.reads), hint=rule.hint)


def _version(where: _Where) -> Iterator[Mistake]:
    version = where.get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        hint = "upgrade with: pip install -U peftcli" if newer else "rewrite it with: peft config RECIPE --upgrade"
        what = f"schema_version is {version}, and this program reads version {SCHEMA_VERSION}"
        yield Mistake(what, where.of("schema_version"), hint=hint)


def _splits(where: _Where) -> Iterator[Mistake]:
    for key in ("data.rows", "data.files", "data.splits"):
        given = where.get(key)
        for split in given if isinstance(given, dict) else ():
            if split not in SPLITS:
                yield Mistake(
                    f"{key} has no split {split!r}", where.of(f"{key}.{split}", key), SPLITS, nearest(split, SPLITS)
                )
    files = where.get("data.files")
    for split, named in files.items() if isinstance(files, dict) else ():
        paths = named if isinstance(named, list) else [named]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            place = where.of(f"data.files.{split}", "data.files")
            yield Mistake(f"data.files.{split} is {named!r}, expected a path or a list of paths", place)


def _texts(where: _Where) -> Iterator[Mistake]:
    for key in ("task.prompt", "task.completion"):
        text = where.get(key)
        if not isinstance(text, str):
            continue
        try:
            columns = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            yield Mistake(f"{key} cannot be read: {error}", where.of(key), hint="write {{ and }} for plain braces")
            continue
        if "" in columns:
            hint = "write {column} for a column, {{ and }} for plain braces"
            yield Mistake(f"{key} has braces without a name", where.of(key), hint=hint)
        elif not columns:
            yield Mistake(f"{key} names no column", where.of(key), hint="name one in braces, such as {text}")
    answer = where.get("task.answer")
    if isinstance(answer, str):
        try:
            groups = re.compile(answer).groups
        except re.error as error:
            yield Mistake(f"task.answer is not a regular expression: {error}", where.of("task.answer"))
        else:
            if groups < 1:
                hint = "put the part that is the answer in parentheses"
                yield Mistake("task.answer has no group", where.of("task.answer"), hint=hint)


def _columns(where: _Where) -> Iterator[Mistake]:
    """A mapping that no template reads, where one is read that has nearly its name and no mapping."""
    texts = [text for key in ("task.prompt", "task.completion") if isinstance(text := where.get(key), str)]
    given = where.get("data.columns")
    if not isinstance(given, dict) or not texts:
        return
    read = {"label"} if where.get("task.type") == "classification" else set()
    for text in texts:
        with suppress(ValueError):  # named by `_texts`
            read |= {name for _, name, _, _ in string.Formatter().parse(text) if name}
    for name in given.keys() - read:
        if near := nearest(name, read - given.keys()):
            place = where.of(f"data.columns.{name}", "data.columns")
            what = f"data.columns.{name} is read by nothing in this task"
            yield Mistake(what, place, tuple(sorted(read)), f"data.columns.{near}")


def two_batch_sizes(checked: Checked) -> list[Mistake]:
    """Rows and tokens both as the size of a batch, where one would be ignored; not for saved runs, which hold both."""
    where = _Where(checked)
    rows, tokens = where.of("training.batch_size"), where.of("training.batch_tokens")
    if where.get("training.batch_tokens") in (None, UNREADABLE) or not rows:
        return []
    # A later override of the tokens replaces a file's rows; the other way round the override would do nothing.
    if rows.startswith("override ") or rows.rpartition(":")[0] == tokens.rpartition(":")[0]:
        what = "training.batch_size and training.batch_tokens both say how large a batch is"
        hint = f"keep one of them (training.batch_tokens=null takes it away); the other one is {rows}"
        return [Mistake(what, tokens, hint=hint)]
    return []


def _metric(where: _Where) -> Iterator[Mistake]:
    task, metric = where.get("task.type"), where.get("task.best_metric")
    known = METRICS.get(task, ()) if isinstance(task, str) else ()
    if isinstance(metric, str) and known and metric not in known:
        what = f"task.best_metric cannot be {metric!r} for {task}"
        yield Mistake(what, where.of("task.best_metric"), known, nearest(metric, known))


def _peft(where: _Where) -> Iterator[Mistake]:
    if where.get("method.name") != "peft":
        return
    tuner, given = where.get("method.type"), where.get("method.args")
    if isinstance(tuner, str) and isinstance(given, dict):
        places = {name: where.of(f"method.args.{name}", "method.args") for name in given}
        yield from peft_types.mistakes(tuner, given, where.of("method.type"), places)


def _samples(where: _Where) -> Iterator[Mistake]:
    """A sample that there is not, or of the wrong kind; what someone put among the samples is theirs to use."""
    for group, kind in (("model", "weights"), ("data", "data")):
        name, known = where.get(f"{group}.name"), sample_kinds.of_kind(kind)
        if where.get(f"{group}.source") != "sample" or not isinstance(name, str) or not name or name in known:
            continue
        place = where.of(f"{group}.name", f"{group}.source")
        if name in sample_kinds.KINDS:
            what = f"sample {name!r} is {sample_kinds.KINDS[name]}, and {group}.name takes a sample of {kind}"
            yield Mistake(what, place, known)
        elif not paths.has_sample(name):
            yield unknown(f"{group} sample", name, known, place, "what each is: peft samples list")


def _bundled(where: _Where) -> Iterator[Mistake]:
    """A name that is not bundled, or is not of the kind that its group takes."""
    for group, kind in (("model", "weights"), ("data", "data")):
        name, known = where.get(f"{group}.name"), sample_kinds.of_kind(kind, sample_kinds.BUNDLED)
        if where.get(f"{group}.source") == "bundled" and isinstance(name, str) and name and name not in known:
            yield unknown(f"bundled {kind}", name, known, where.of(f"{group}.name", f"{group}.source"))
