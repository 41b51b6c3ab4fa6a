"""Each few-shot task fine-tuned by itself, from the model that the run gives it, and then measured.

The prototypes are recomputed at every step from the support as it is; the loss is that of the support changed at
random (texts: as it is). No query row is learnt from; the learning rate is given, or chosen on validation classes.

Sources: PMF (Hu et al., CVPR 2022) for the procedure; DiffAugment (Zhao et al., NeurIPS 2020) for the changes.

N rows of a support, C channels, S pixels a side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.artifacts.few_shot import task_of
from peftcli.artifacts.few_shot_merge import plain
from peftcli.artifacts.tuned import Tuned
from peftcli.config import catalog
from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import OptimConfig
from peftcli.data.single import read_split
from peftcli.methods import episodes, registry
from peftcli.methods.contract import Calibration, Method
from peftcli.methods.episodes import Episode
from peftcli.models import families
from peftcli.tasks.contract import Encoded, Quality
from peftcli.tasks.episodes import measure
from peftcli.tasks.episodes.pool import Pool
from peftcli.tasks.episodes.support import Support
from peftcli.training import optimiser, seeds

RATES = (1e-5, 1e-4, 1e-3, 1e-2)
"""Learning rates to choose from."""
TASKS = 3
"""Tasks of each validation domain to choose on."""
CHANGED = 0.9
"""Share of the steps whose support is changed."""


@dataclass(frozen=True)
class Then:
    """What happens to the model of each task.

    Attributes:
        method: Its name; with the settings that a recipe has where it says nothing.
        lr: Its learning rate; None has it chosen.
        steps: Of gradient descent (AdamW).
    """

    method: str
    lr: float | None = None
    steps: int = 50

    def new(self) -> Method:
        """The method, fresh."""
        return registry.find(self.method)(catalog.settings_class(self.method)())


def check(then: Then) -> None:
    """Stop before anything is loaded.

    Raises:
        UserError: No such method, or one that cannot go on from a task's model.
    """
    if then.method not in catalog.methods():
        raise UserError(unknown("method", then.method, catalog.methods(), "--then"))
    can = then.new().capabilities
    if not can.trains or not can.wrapped:
        why = "trains nothing" if not can.trains else "learns from many tasks, and this is one"
        raise UserError(Mistake(f"method {then.method} {why}", "--then", ("lora", "full", "...")))


def measured(tuned: Tuned, then: Then, notes: list[str]) -> Callable[[Encoded], list[Quality]]:
    """A function from tasks to the row of the quality table that says how fine-tuning does on them.

    Args:
        tuned: A few-shot run.
        then: What happens to the model of each task.
        notes: Gets what was chosen.
    """

    def measure_them(encoded: Encoded) -> list[Quality]:
        assert isinstance(encoded, Pool)
        if then.lr is None and encoded.key[-1] == "validation":
            what = "a learning rate is chosen on validation classes, and these are to be measured"
            raise UserError(Mistake(what, "--then", hint="give it: --then-lr 1e-3"))
        lr = _choose(tuned, then, notes) if then.lr is None else then.lr
        notes.append(
            f"then {then.method}: {then.steps} steps at {lr:g} on the support of each task, from its own model"
        )
        found = _on(tuned, encoded, replace(then, lr=lr))
        return [Quality(f"tuned, then {then.method}", found.metrics, found.intervals)]

    return measure_them


def _on(tuned: Tuned, pool: Pool, then: Then) -> Any:
    return measure.evaluate(
        task_of(tuned), tuned.model, pool, tuned.tokenizer, tuned.device, tuned.precision, True, _Tuning(then)
    )


def _choose(tuned: Tuned, then: Then, notes: list[str]) -> float:
    """The learning rate with the highest accuracy on a few tasks of validation classes; the lower of two alike."""
    task = task_of(tuned)
    try:
        rows, _ = read_split(tuned.config.data, task.needed, "validation")
    except UserError as error:
        hint = "give it: --then-lr 1e-3"
        raise UserError(Mistake("a learning rate is chosen on validation classes", "--then", hint=hint)) from error
    whole = task.encode_split(rows, tuned.tokenizer)
    few = replace(whole, fixed=TASKS, lengths=[1] * TASKS * len(whole.members))
    scores = {lr: _on(tuned, few, replace(then, lr=lr)).metrics["accuracy"] for lr in RATES}
    best = max(RATES, key=lambda lr: (scores[lr], -lr))
    told = ", ".join(f"{lr:g} {score:.1%}" for lr, score in scores.items())
    notes.append(f"learning rate {best:g}, by accuracy on {len(few)} tasks of validation classes: {told}")
    return best


@dataclass(frozen=True)
class _Tuning:
    """From a run's model to one that was fine-tuned on a task's support."""

    then: Then

    def __call__(self, model: Any, episode: Episode) -> nn.Module:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
            given, classes_N = episode.part(query=False)
            inputs = {name: value.clone() for name, value in given.items()}
            support = Support(inputs, classes_N.clone(), [str(i) for i in range(episode.ways)])
            seeds.start(0, "then", str(len(classes_N)), str(episode.ways))
            with torch.no_grad():
                own = plain(copy.deepcopy(model).float(), support)
            return finetuned(own, support, self.then)


def finetuned(model: Any, support: Support, then: Then) -> nn.Module:
    """A plain model without a head after some steps on a support; the given one is used up.

    Args:
        model: In float32.
        support: On its device.
        then: With a learning rate.
    """
    assert then.lr is not None
    method = then.new()

    def loss_on(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        changed = {name: _changed(value) if name == "pixel_values" else value for name, value in batch.items()}
        features_ND = episodes.wide(model(**batch).logits)
        means_CD = episodes.prototypes(features_ND, support.classes_N, support.ways)
        asked_ND = features_ND if changed.keys() == {"input_ids", "attention_mask"} else _features(model, changed)
        return F.cross_entropy(episodes.scores(asked_ND, means_CD), support.classes_N)

    model.requires_grad_(False)
    calibration = Calibration([[support.inputs]], loss_on, 1, then.steps)
    tuned = method.attach(model, families.find(model.config.model_type), calibration).eval()
    config = OptimConfig(lr=then.lr, schedule="constant", warmup_share=0.0)
    done = 0
    for stage in method.stages(then.steps):
        if stage.start:
            stage.start(tuned)
        moved = optimiser.build(config, tuned, method.parameter_groups(tuned))
        method.take_optimiser(tuned, moved)
        for step in range(stage.steps):
            optimiser.set_rate(moved, config, step, stage.steps)
            loss, extra = loss_on(tuned, support.inputs), method.penalty(tuned)
            (loss if extra is None else loss + extra).backward()
            nn.utils.clip_grad_norm_([p for p in tuned.parameters() if p.grad is not None], config.clip_norm or 1.0)
            moved.step()
            done += 1
            method.after_step(tuned, done)
            moved.zero_grad()
    method.finish(tuned)
    return tuned.requires_grad_(False)


def _features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return episodes.wide(model(**inputs).logits)


def _changed(pixels_NCSS: Tensor) -> Tensor:
    """Pictures in other light and colours, and moved by up to an eighth, each by itself; now and then as they are."""
    if float(torch.rand(())) > CHANGED:
        return pixels_NCSS
    rows, _, high, wide = pixels_NCSS.shape
    light, colour, contrast = torch.rand(3, rows, 1, 1, 1, device=pixels_NCSS.device, dtype=pixels_NCSS.dtype)
    x = pixels_NCSS + light - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * 2 * colour + grey
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * (contrast + 0.5) + middle
    most = (high // 8, wide // 8)
    padded = F.pad(x, (most[1], most[1], most[0], most[0]))
    down, right = (torch.randint(0, 2 * most[axis] + 1, (rows,)).tolist() for axis in (0, 1))
    return torch.stack([one[:, d : d + high, r : r + wide] for one, d, r in zip(padded, down, right, strict=True)])
