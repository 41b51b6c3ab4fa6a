"""The models and rows of scripts/evidence_rowcol.py, and a job for each of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence_smaller as smaller
from evidence import Result, Store

SEEDS = range(3)
SHARES = (50, 75, 35)
"""Per cent of the backbone's parameters; the first one also for what only it is measured for."""
RATES, ADAPTER_RATES = (3e-5, 1e-4, 3e-4), (1e-3, 3e-3, 1e-2)
OURS, SVD, PRUNED, LONGER = "data", "svd", "pruned", "longer"
ARMS = {
    OURS: "row and column spaces of data",
    SVD: "SVD of the weights",
    PRUNED: "smallest weights zero",
}
SHARED = (
    "launch.threads=1", "launch.device=cpu", "training.precision=bf16", "training.eval_every=end",
    "training.save_every=1000000", "training.keep_best=false", "training.baselines=false",
    "training.eval_batch_size=64", "fetch=false",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and rows.

    Attributes:
        title: In the tables.
        recipe: A recipe of them.
        metric: What is counted, in points of a hundred.
        overrides: Of the small size.
        full: Of the full size.
        steps: Of each model made of the original, which has twice as many.
        shares: Per cents that it is made smaller to.
        targets: What adapters change.
        ranks: Of LoRA; of cores with as many trained numbers, and with a tenth.
        pixels: Widths of the pictures that latencies are of; 0 is that of the rows.
    """

    title: str
    recipe: str
    metric: str
    overrides: tuple[str, ...]
    full: tuple[str, ...]
    steps: int
    shares: tuple[int, ...] = SHARES
    targets: str = ""
    ranks: tuple[int, int, int] | None = None
    pixels: tuple[int, ...] = (0,)

    def ways(self) -> list[tuple[int, str]]:
        """Pixels and precisions that latencies are of."""
        return [(pixels, precision) for pixels in self.pixels for precision in ("bf16", "fp32")]


CASES = {
    "vit": Case(
        "ViT-S/14 on solar cells, 56 pixels", "vit/elpv_linear_probe", "AUROC",
        ("task.image_size=56", "training.batch_size=32"), ("task.image_size=112", "training.batch_size=32"), 40,
        targets="[attention.q,attention.v]", ranks=(8, 78, 24), pixels=(0, 224),
    ),
    "resnet": Case(
        "ResNet-50 of half width on solar cells, 96 pixels", "resnet/elpv_linear_probe", "AUROC",
        ("task.image_size=96", "training.batch_size=32"), ("task.image_size=112", "training.batch_size=32"), 40,
        targets="[conv]", ranks=(8, 92, 25), pixels=(0, 224),
    ),
    "resnet-emoji": Case(
        "ResNet-50 of half width on emoji, 96 pixels", "resnet/emoji-google_linear_probe", "accuracy",
        ("task.image_size=96", "training.batch_size=32"), ("task.image_size=112", "training.batch_size=32"), 80, (50,),
        pixels=(),
    ),
    "vit-emoji": Case(
        "ViT-S/14 on emoji, 56 pixels", "vit/emoji-google_linear_probe", "accuracy",
        ("task.image_size=56", "training.batch_size=32"), ("task.image_size=112", "training.batch_size=32"), 40, (50,),
        pixels=(),
    ),
    "smollm2": Case(
        "SmolLM2-135M, a word to its meaning", "smollm2/wordnet-gloss_lora", "right tokens",
        ("data.rows={train: 1000, validation: 60, test: 150}", "task.max_length=64", "training.batch_size=8"),
        ("data.rows={train: 4000, validation: 200, test: 400}", "training.batch_size=8"), 15, (50,),
        targets="[attention.q,attention.v]", ranks=(8, 88, 28),
    ),
}  # fmt: skip


class Bench:
    """A job for each run.

    Args:
        out: Folder of the results.
        full: The full size.
    """

    def __init__(self, out: Path, full: bool):
        self.full, ending = full, ".full" if full else ""
        self.store = Store(out / f"evidence_rowcol{ending}.jsonl")
        self.folder = out / f"evidence_rowcol_originals{ending}"

    def overrides(self, name: str, rate: float, seed: int, times: int = 1) -> list[str]:
        case = CASES[name]
        steps = f"training.max_steps={times * case.steps * (10 if self.full else 1)}"
        return [*(case.full if self.full else case.overrides), *SHARED, steps, f"optim.lr={rate}", f"seed={seed}"]

    def place(self, name: str, rate: float, seed: int) -> Path:
        return self.folder / f"{name}-seed{seed}-{rate:g}"

    def original(self, name: str, rate: float, seed: int) -> tuple[str, tuple[Any, ...]]:
        given = ["method=full", *self.overrides(name, rate, seed, times=2)]
        job = (smaller.original, CASES[name].recipe, given, str(self.place(name, rate, seed)))
        return f"{name}/original/{rate:g}/{seed}", job

    def arm(self, name: str, arm: str, share: int, seed: int) -> tuple[str, tuple[Any, ...]]:
        rate = self.rate(name)
        base = [f"model.name={self.place(name, rate, seed)}", "model.source=folder", "model.dtype=float32"]
        given = [*base, "~model.shape", *self.overrides(name, rate, seed)]
        if arm == LONGER:
            folder = f"{self.place(name, rate, seed)}-longer"
            return f"{name}/{arm}/{rate:g}/{seed}", (
                smaller.original,
                CASES[name].recipe,
                ["method=full", *given],
                folder,
            )
        given = ["method=rowcol", "method.mode=compress", f"method.target.parameters={share}%", *given]
        given += ["method.basis=weight"] if arm == SVD else []
        return f"{name}/{arm}/{share}/{rate:g}/{seed}", (smaller.smaller, CASES[name].recipe, given, arm == PRUNED)

    def timed(self, name: str, pixels: int, precision: str) -> tuple[str, tuple[Any, ...]]:
        _, (_, recipe, given, _) = self.arm(name, OURS, SHARES[0], 0)
        size = [f"task.image_size={pixels}"] if pixels else []
        key = f"{name}/costs {pixels} {precision}/{self.rate(name):g}"
        return key, (smaller.timed, recipe, [*given, *size, f"training.precision={precision}"])

    def adapter(self, name: str, kind: int, rate: float, seed: int) -> tuple[str, tuple[Any, ...]]:
        case = CASES[name]
        assert case.ranks is not None
        rank = case.ranks[kind]
        method = [f"method.rank={rank}"] if kind else [f"method.r={rank}", f"method.alpha={2 * rank}"]
        given = ["method=rowcol" if kind else "method=lora", *method, f"method.targets={case.targets}"]
        given += self.overrides(name, rate, seed)
        return f"{name}/adapter{kind}/{rate:g}/{seed}", (smaller.adapter, case.recipe, given)

    def rate(self, name: str) -> float:
        """The original's rate with the best validation metric, for it and for all that is made of it."""
        return max(RATES, key=lambda rate: self.store.results[f"{name}/original/{rate:g}/0"]["validation"])

    def started(self, name: str) -> bool:
        """Whether the rate of a case is known."""
        return bool(self.runs([self.original(name, rate, 0)[0] for rate in RATES]))

    def adapter_rate(self, name: str, kind: int) -> float:
        found = self.store.results
        return max(ADAPTER_RATES, key=lambda rate: found[f"{name}/adapter{kind}/{rate:g}/0"]["validation"])

    def has_adapters(self, name: str) -> bool:
        """Whether all runs of them are there."""
        grid = [self.adapter(name, kind, rate, 0)[0] for kind in range(3) for rate in ADAPTER_RATES]
        if not self.runs(grid):
            return False
        chosen = [self.adapter(name, k, self.adapter_rate(name, k), seed)[0] for k in range(3) for seed in SEEDS]
        return bool(self.runs(chosen))

    def runs(self, keys: Sequence[str]) -> list[Result]:
        """The results of all of them, or none."""
        found = [self.store.results[key] for key in keys if key in self.store.results]
        return found if len(found) == len(keys) else []

    def arms(self, name: str, arm: str, share: int) -> list[Result]:
        return self.runs([self.arm(name, arm, share, seed)[0] for seed in SEEDS])
