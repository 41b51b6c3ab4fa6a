"""The arms of scripts/evidence_smat.py, its model, and a job for each of its runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evidence import Result, Store
from evidence_episodes import mean_of

RECIPE = "vit/emoji_smat"
STAGES = 3
"""Of the four of resnet50-thin; the last one has two thirds of its weights, and its features are worse prototypes."""
SEEDS = 3
STEPS = 300
KEPT = 60
"""Validation tasks of each domain."""
PRE, META = "pre-trained prototypes", "dense meta-tuning"
SMAT, FOUR, ONE, ALONE = "SMAT, 8 experts", "SMAT, 4 experts", "SMAT, 1 expert", "SMAT, 8 experts, no teacher"
LONGER = 4
"""Times the steps of the others."""
LONG_META, LONG = f"{META}, {LONGER} times the steps", f"{SMAT}, {LONGER} times the steps"
ARMS = {
    PRE: ["method=frozen"],
    META: ["method=full"],
    SMAT: ["method.experts=8"],
    ONE: ["method.experts=1"],
    FOUR: ["method.experts=4"],
    ALONE: ["method.experts=8", "method.distillation=0"],
    LONG_META: ["method=full"],
    LONG: ["method.experts=8"],
}
FIRST, LAST, OTHERS = (META, SMAT), (LONG_META, LONG), (ONE, FOUR, ALONE)
DAMAGED, DENSE = (PRE, *LAST), (PRE, META, LONG_META)
RATES = (5e-5, 1e-4, 2e-4)
SMAT_RATE = 5
"""Times those: mixed experts move a weight that they have by a part of the change."""
FINE = {"full": (0.0, 1e-4, 1e-3), "lora": (0.0, 1e-4, 1e-3)}
FINE_STEPS = 10
OTHERWISE = {"a step on the support first": ["method.inner_lr=1e-3"], "no teacher": ["method.distillation=0"]}
SHARED = (
    "launch.threads=1", "launch.device=cpu", "model.dtype=float32", "training.precision=bf16",
    "training.eval_every=end", "training.save_every=1000000", "training.keep_best=false", "training.baselines=false",
    "training.batch_size=2", "task.image_size=48", "task.ways=[5,8]", "task.support=30", "task.class_support=5",
    "task.queries=3", f"task.validation_episodes={KEPT}",
)  # fmt: skip


OWN_SIZE = ("launch.threads=1", "launch.device=cpu", "training.precision=bf16", "training.batch_size=1")
"""Of the recipe as it is, a ViT-S/14, but for the number of tasks of a step."""


class Bench:
    """A job for each arm.

    Args:
        out: Folder of the results.
        full: The large size.
    """

    def __init__(self, out: Path, full: bool):
        self.full, self.name = full, f"evidence_smat{'.full' if full else ''}"
        self.out, self.store = out, Store(out / f"{self.name}.jsonl")
        self.steps, self.tasks = (5 * STEPS, 600) if full else (STEPS, 100)
        self.fine_seeds, self.fine_tasks = (range(SEEDS), 50) if full else (range(1), 8)

    def overrides(self, arm: str, rate: float = 0.0, seed: int = 0) -> list[str]:
        """Of the recipe."""
        lr = [] if arm == PRE else [f"optim.lr={rate:g}"]
        model = ["model=resnet50-thin", *_model(self.out / "evidence_smat.base")]
        steps = self.steps * (LONGER if arm in LAST else 1)
        size = [f"task.test_episodes={self.tasks}", f"training.max_steps={steps}"]
        return [*SHARED, *model, *size, *ARMS[arm], *lr, f"seed={seed}"]

    def place(self, arm: str, rate: float, seed: int) -> Path | None:
        """Where the trained tensors are."""
        name = key("", arm, rate, seed).strip("/").replace("/", "_").replace(", ", "_").replace(" ", "-")
        return None if arm == PRE else self.out / f"{self.name}.weights" / f"{name}.safetensors"

    def grid(self, arms: Iterable[str]) -> dict[str, Any]:
        """Each arm at each rate with the first seed."""
        chosen = [(arm, rate) for arm in arms for rate in rates_of(arm)]
        return {key("train", arm, rate, 0): self._train(arm, rate, 0) for arm, rate in chosen}

    def _train(self, arm: str, rate: float, seed: int) -> tuple[Any, ...]:
        return RECIPE, self.overrides(arm, rate, seed), self.place(arm, rate, seed)

    def rate(self, arm: str) -> float:
        """The rate of an arm, or of the one that it differs from in one thing, with the best validation tasks."""
        found, tried = self.store.results, SMAT if arm in OTHERS else arm
        return max(rates_of(tried), key=lambda rate: mean_of(found[key("train", tried, rate, 0)]["validation"]))

    def seeds(self, arms: Iterable[str]) -> dict[str, Any]:
        """Each arm at its rate with the seeds that no grid had."""
        chosen = [(arm, self.rate(arm), seed) for seed in range(SEEDS) for arm in arms if seed or arm in OTHERS]
        return {key("train", *one): self._train(*one) for one in chosen}

    def jobs(self, kind: str, arms: Iterable[str], seeds: Iterable[int], *more: Any) -> dict[str, Any]:
        """What is done with trained models."""
        chosen = [(arm, self.rate(arm), seed) for seed in seeds for arm in arms if arm != PRE or seed == 0]
        return {key(kind, *one): (*self._train(*one), *more) for one in chosen}

    def step_times(self) -> dict[str, Any]:
        """Steps of dense meta-tuning against those of SMAT, here and of the recipe's own size, and what they are spent
        on."""
        small = [self.overrides(arm, rates_of(arm)[0]) for arm in FIRST]
        own = [[*OWN_SIZE, *ARMS[arm]] for arm in FIRST]
        found = {"step times": (RECIPE, small, 12), "step times, recipe": (RECIPE, own, 6)}
        less = {f"step times, {name}": (RECIPE, [small[0], [*small[1], *off]], 12) for name, off in OTHERWISE.items()}
        return found | less

    def tuned(self, how: str) -> dict[str, Any]:
        """Fine-tuning from trained models."""
        return self.jobs(f"tuned {how}", DAMAGED, self.fine_seeds, how, FINE[how], FINE_STEPS, self.fine_tasks)

    def runs(self, kind: str, arm: str, seeds: Iterable[int] = range(SEEDS)) -> list[Result]:
        """The results of an arm that are there, seed by seed; nothing of the pre-trained model depends on the seed."""
        found = self.store.results
        tried = SMAT if arm in OTHERS else arm
        if any(key("train", tried, rate, 0) not in found for rate in rates_of(tried)):
            return []
        rate = self.rate(arm)
        keys = [key(kind, arm, rate, 0 if arm == PRE else seed) for seed in seeds]
        return [found[name] for name in keys if name in found]

    def has(self, kind: str, arm: str, seeds: Sequence[int] = range(SEEDS)) -> bool:
        """Whether all of these are there."""
        return len(self.runs(kind, arm, seeds)) == len(seeds)


def key(kind: str, arm: str, rate: float, seed: int) -> str:
    return f"{kind}/{arm}/{rate:g}/{seed}"


def rates_of(arm: str) -> list[float]:
    """What an arm may learn at; dense meta-tuning for longer chose the lowest of the three, and got one below."""
    if arm == PRE:
        return [0.0]
    return [
        *([RATES[0] / 2] if arm == LONG_META else []),
        *(rate * (1 if arm in DENSE else SMAT_RATE) for rate in RATES),
    ]


def _model(folder: Path) -> list[str]:
    """What names the first stages of resnet50-thin."""
    shape = json.loads((folder / "config.json").read_text())
    return [
        f"model.name={folder}", "model.source=folder", f"model.shape.hidden_sizes={shape['hidden_sizes']}",
        f"model.shape.depths={shape['depths']}",
    ]  # fmt: skip


def cut_off(folder: Path) -> None:
    """Put the first stages of resnet50-thin into a folder of their own."""
    from safetensors.torch import load_file, save_file

    from peftcli.config import paths

    if (folder / "model.safetensors").is_file():
        return
    whole = paths.cache() / "samples" / "resnet50-thin"
    folder.mkdir(parents=True, exist_ok=True)
    shape = json.loads((whole / "config.json").read_text())
    shape |= {name: shape[name][:STAGES] for name in ("hidden_sizes", "depths")}
    for name in ("stage_names", "out_features", "out_indices"):
        shape.pop(name, None)
    (folder / "config.json").write_text(json.dumps(shape))
    shutil.copy(whole / "preprocessor_config.json", folder)
    tensors = load_file(whole / "model.safetensors")
    kept = {
        name: tensor for name, tensor in tensors.items() if not name.startswith("classifier") and _stage(name) < STAGES
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _stage(name: str) -> int:
    return int(name.split("stages.")[1].split(".")[0]) if "stages." in name else -1
