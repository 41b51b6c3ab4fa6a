"""What types cannot say: ranges of single values, and values that do not go together. Two tables, checked at once."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from math import inf, isfinite
from typing import Any

from peftcli.config import paths, peft_types, sample_kinds, slurm_rules, targets
from peftcli.config.errors import Mistake, UserError, nearest, unknown
from peftcli.config.rule_table import METRICS, RULES, SCORED
from peftcli.config.schema import SCHEMA_VERSION
from peftcli.config.validate import SCHEMA_DEFAULT, UNREADABLE, Checked

SPLITS = ("train", "validation", "test")
_TINY = 5e-324  # the smallest number above zero: "more than 0"
RANGES: dict[str, tuple[float, float]] = {
    "data.validation_share": (0, 1 - 1e-9),
    "data.test_share": (0, 1 - 1e-9),
    "task.max_length": (1, inf),
    "task.max_new_tokens": (1, inf),
    "task.generated_rows": (0, inf),
    "task.image_size": (8, 4096),
    "task.label_smoothing": (0, 1 - 1e-9),
    "task.false_alarms": (0, 1 - 1e-9),
    "task.augment.crop": (_TINY, 1),
    "task.augment.colour": (0, 1),
    "task.augment.rotation": (0, 180),
    "task.augment.randaugment": (0, inf),
    "task.augment.randaugment_strength": (0, 30),
    "task.augment.mixup": (0, inf),
    "task.augment.cutmix": (0, inf),
    "task.episodes": (1, inf),
    "task.validation_episodes": (2, inf),
    "task.test_episodes": (2, inf),
    "task.ways": (2, inf),
    "task.support": (2, inf),
    "task.class_support": (1, inf),
    "task.queries": (1, inf),
    "task.seed": (0, 2**32 - 1),
    "task.beams": (1, inf),
    "task.samples": (1, inf),
    "task.temperature": (_TINY, inf),
    "task.top_p": (_TINY, 1),
    "task.shots": (0, 99),
    "optim.lr": (_TINY, inf),
    "optim.weight_decay": (0, inf),
    "optim.eps": (_TINY, inf),
    "optim.betas": (0, 1 - 1e-9),
    "optim.warmup_share": (0, 1),
    "optim.final_share": (0, 1),
    "optim.clip_norm": (_TINY, inf),
    "training.epochs": (_TINY, inf),
    "training.max_steps": (0, inf),
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
    "launch.nodes": (1, inf),
    "launch.gpus_per_node": (1, inf),
    "launch.cpus_per_task": (1, inf),
    "launch.warning": (10, 65535),
    "launch.requeues": (0, inf),
    "launch.at_once": (1, inf),
    "launch.preflight_seconds": (_TINY, inf),
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
    "method.prune": (0, 1 - 1e-9),
    "method.sparsity": (0, 1 - 1e-9),
    "method.wide": (1, inf),
    "method.floor": (0, inf),
    "method.l1": (0, inf),
    "method.group": (0, inf),
    "method.probe": (0, 1 - 1e-9),
    "method.few": (0, 1 - 1e-9),
    "method.final": (0, 1 - 1e-9),
    "method.guard": (0, inf),
    "method.experts": (1, inf),
    "method.expert_choices": (1, inf),
    "method.sparsity_choices": (0, 1 - 1e-9),
    "method.inner_lr": (0, inf),
    "method.teacher_steps": (0, inf),
    "method.teacher_lr": (_TINY, inf),
    "method.distillation": (0, 1),
    "method.temperature": (_TINY, inf),
    "method.router_temperature": (_TINY, inf),
    "method.router_lr": (_TINY, inf),
    "method.mask_lr": (_TINY, inf),
    "method.multiplier_lr": (_TINY, inf),
    "method.settle": (0, 1 - 1e-9),
    "method.distill.weight": (0, 1),
    "method.distill.temperature": (_TINY, inf),
    "method.distill.features": (0, inf),
    "seed": (0, 2**32 - 1),
    "data.seed": (0, 2**32 - 1),
}
"""Lowest and highest value of a number, or of each number in a list."""
AMOUNTS = {
    "method.channels": 1,
    "method.states": 1,
    "method.pruned": 0,
    "method.warmup": 1,
    "method.last_blocks": 1,
    "method.few_blocks": 1,
    "method.chosen": 1,
    "method.distill.layerwise_steps": 0,
}
"""Lowest count where a whole number is a count and any other number a share; a share is above 0 and at most 1."""


def conflicts(checked: Checked) -> list[Mistake]:
    """Every broken range and rule; a value that is already known to be a mistake breaks none."""
    where = _Where(checked)
    found = [*_ranges(where), *_amounts(where), *_rules(where), *_version(where), *_splits(where), *_texts(where)]
    return [
        *found,
        *_no_step(where),
        *_target(where),
        *_columns(where),
        *_metric(where),
        *_peft(where),
        *_samples(where),
        *_bundled(where),
        *slurm_rules.mistakes(where.get, where.of),
    ]


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
        for number in value if isinstance(value, tuple | list) else (value,):
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


def _no_step(where: _Where) -> Iterator[Mistake]:
    """No step at all, where there is nothing to look at before the first."""
    made_smaller = where.get("method.name") == "rowcol" and where.get("method.mode") == "compress"
    if where.get("training.max_steps") == 0 and not made_smaller:
        what = "training.max_steps is 0, expected 1 or more; only method.mode=compress of rowcol may take no step"
        yield Mistake(what, where.of("training.max_steps"))


def _target(where: _Where) -> Iterator[Mistake]:
    """A target of an unknown name, or a share that is none; how many there are is a rule."""
    target = where.get("method.target")
    if isinstance(target, dict) and [type(said) in (str, int, float) for said in target.values()] == [True]:
        try:
            targets.read(target)
        except UserError as error:
            yield from (replace(mistake, where=where.of(mistake.where, "method.target")) for mistake in error.mistakes)


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
    for key in ("data.rows", "data.files", "data.splits", "data.where"):
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
    for key in ("task.prompt", "task.completion", "task.tests"):
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
    keys = ("task.prompt", "task.completion", "task.program", "task.tests")
    texts = [text for key in keys if isinstance(text := where.get(key), str)]
    given = where.get("data.columns")
    if not isinstance(given, dict) or not texts:
        return
    read = {"label"} if where.get("task.type") == "classification" else set()
    read |= {"database"} if where.get("task.scoring") == "sql" else set()
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
    if task == "generation":
        scoring = where.get("task.scoring")
        if scoring is UNREADABLE:
            return
        known += SCORED[scoring]
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
        kind = where.get("model.quantization")
        for key, what in peft_types.on_packed(tuner, given, kind) if kind in peft_types.PACKED else ():
            known = tuple(sorted(peft_types.PACKED[kind])) if key == "method.type" else ()
            yield Mistake(what, where.of(key, "method.args", "method.type"), known, hint="model.quantization=null")


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
