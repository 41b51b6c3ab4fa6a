"""What a recipe leaves to `auto` and training rows cannot tell: short runs of each candidate, measured on validation.

Successive halving (Jamieson and Talwalkar, AISTATS 2016), with thirds: a round keeps a third of the candidates and has
three times the steps. Each run starts anew and is a whole one in small, with its schedules and stages. The test split
is not read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from peftcli.artifacts.atomic import write_json
from peftcli.artifacts.run_folder import RunFolder
from peftcli.config.errors import Mistake, UserError
from peftcli.config.schema import RunConfig
from peftcli.methods import registry as methods
from peftcli.methods.contract import Candidate
from peftcli.training import closing, loop, prepare
from peftcli.training.display import Display
from peftcli.training.prepare import Material
from peftcli.training.signals import StopRequest

KEEP = 3
"""One of so many candidates stays for the next round, which has so many times the steps."""
SHARE, LEAST = 0.03, 10
"""Steps of a first round that chooses among more than `KEEP`, as a share of the run's; and at least."""
FOLDER, FILE = "trials", "trials.json"


@dataclass(frozen=True)
class Trial:
    """A short run.

    Attributes:
        about: Its candidate.
        steps: Of the run.
        value: Of the task's best metric on the validation split.
    """

    about: dict[str, float]
    steps: int
    value: float


def rounds(candidates: int, steps: int) -> list[tuple[int, int]]:
    """Candidates and steps of each round of a run of so many steps.

    Up to three candidates have one round; more have a round of `SHARE` of the steps first.
    """
    found, left = [], candidates
    length = max(LEAST, round(SHARE * steps * (KEEP if candidates <= KEEP else 1)))
    while left > 1:
        found.append((left, length))
        left, length = math.ceil(left / KEEP), length * KEEP
    return found


def settle(
    config: RunConfig, material: Material, accelerator: Accelerator, run: RunFolder, display: Display, stop: StopRequest
) -> tuple[RunConfig, list[Trial]]:
    """The config with the method's settings all given, and the trials that gave them; both as they are without trials.

    What was tried is kept in the run's folder, so that a resumed run has the same settings.

    Raises:
        UserError: There is no validation split to choose by.
        Stopped: A signal asked for it.
    """
    candidates = methods.find(config.method.name)(config.method).candidates()
    if not candidates:
        return config, []
    if material.validation is None:
        what = f"{', '.join(candidates[0].about)}: auto is chosen by the validation split, and there is none"
        raise UserError(Mistake(what, "data", hint="give data.validation_share, or numbers in place of auto"))
    kept = run.path / FILE
    trials = [Trial(**row) for row in json.loads(kept.read_text())] if kept.is_file() else []
    bench = _Bench(config, material, accelerator, run, stop)
    _, steps = prepare.build_feed(config, material, accelerator)
    for count, length in rounds(len(candidates), steps):
        candidates = candidates[:count]
        for one in candidates:
            if _known(trials, one, length) is None:
                trials.append(Trial(one.about, length, bench.value(one, length)))
                if accelerator.is_main_process:
                    write_json(kept, [vars(trial) for trial in trials])
                display.say(f"tried {_words(one)} for {length} steps: {bench.metric} {trials[-1].value:.4f}")
        candidates = _ranked(candidates, trials, length, material.task.higher_is_better)
    display.say(f"chosen by the validation split: {_words(candidates[0])}")
    return replace(config, method=candidates[0].settings), trials


def figures(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What candidates reached in the first round, for the report; nothing without trials."""
    first = [trial for trial in trials if trial.steps == trials[0].steps]
    if not first:
        return []
    return [
        {
            "title": "What auto chose among: short runs on the validation split",
            "x": [", ".join(f"{value:g}" for value in trial.about.values()) for trial in first],
            "y": [[trial.value for trial in first]],
            "labels": {"x": ", ".join(first[0].about), "y": f"after {first[0].steps} steps", "series": ["validation"]},
        }
    ]


def _known(trials: Sequence[Trial], one: Candidate, steps: int) -> float | None:
    return next((t.value for t in trials if t.about == one.about and t.steps == steps), None)


def _ranked(candidates: list[Candidate], trials: Sequence[Trial], steps: int, higher: bool) -> list[Candidate]:
    """The best first; of equal ones the one that came first."""
    return sorted(candidates, key=lambda one: (-1 if higher else 1) * (_known(trials, one, steps) or 0.0))


def _words(one: Candidate) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in one.about.items())


class _Bench:
    """Runs candidates."""

    def __init__(
        self, config: RunConfig, material: Material, accelerator: Accelerator, run: RunFolder, stop: StopRequest
    ):
        self.config, self.material, self.accelerator, self.run, self.stop = config, material, accelerator, run, stop
        self.metric = material.task.best_metric

    def value(self, one: Candidate, steps: int) -> float:
        """Train a candidate for some steps and measure it once, at the end."""
        training = replace(
            self.config.training, max_steps=steps, eval_every="end", save_every=steps + 1, keep_best=False,
            early_stopping=None,
        )  # fmt: skip
        config = replace(self.config, method=one.settings, training=training)
        folder = RunFolder(self.run.path / FOLDER)
        folder.path.mkdir(exist_ok=True)
        accelerator, material = self.accelerator, self.material
        loaded = prepare.load_model(config, material, accelerator)
        feed, steps = prepare.build_feed(config, material, accelerator)
        attached = prepare.attach(config, loaded, material, feed, steps, accelerator)
        display = Display(folder.log_file, steps, speaks=accelerator.is_main_process, quiet=True)
        job = loop.Job(
            config, attached.model, attached.method, material.task, feed, steps, accelerator, folder, display, self.stop
        )  # fmt: skip
        try:
            loop.train(job)
            job.method.finish(job.model)
            assert material.validation is not None
            found = closing.Measurer(material, material.validation, config, accelerator)(job.model)
        finally:
            display.close()
            if accelerator.is_main_process:
                shutil.rmtree(folder.path, ignore_errors=True)
        return broadcast_object_list([found])[0][self.metric] if accelerator.num_processes > 1 else found[self.metric]
