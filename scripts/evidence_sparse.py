"""Sparse adapters against the same ones dense, LoRA and a linear probe, on pictures of solar cells: the tables in
peftcli/methods/sparse_adapter/README.md.

    python scripts/evidence_sparse.py run --out build      # resumable
    python scripts/evidence_sparse.py table --out build    # writes the tables from build/evidence_sparse.jsonl

Needs the samples vit-s14, resnet50-thin and elpv. All arms get the same pictures, steps and grid of learning rates,
chosen for each by validation AUROC with the first seed. What comes before the last blocks is frozen in all of them and
computed once. `--size full` takes five times the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evidence import Result, Store, command, here, table
from evidence_scores import KEPT_BACK, Few, auroc, difference, pairs, scored

README = Path(__file__).resolve().parent.parent / "peftcli/methods/sparse_adapter/README.md"
SEEDS, MORE_SEEDS = 5, 10
"""Runs of an arm; more with all labels, where a point is to be told."""
RATES = (1e-3, 3e-3, 1e-2)
BATCH = 64
MARGIN = 0.01
"""AUROC by which fewer weights may be worse."""
BAR = 4
"""Times that the file of a sparse adapter has to be smaller than the dense one's."""
POWER = 2.80 / 1.96
"""From half a 95 % interval to the difference that is seen four times in five."""
FIRST = "adapter, dense"
UNITS = "units, 80 % pruned"
WEIGHTS = "weights, 80 % pruned"
LORA = "LoRA"
PROBE = "linear probe"
SPARSE = ["method=sparse_adapter", "method.r=32"]
ARMS = {
    FIRST: [*SPARSE, "method.sparsity=0", "method.l1=0", "method.group=0"],
    UNITS: [*SPARSE, "method.sparsity=0.8"],
    WEIGHTS: [*SPARSE, "method.sparsity=0.8", "method.structure=weight"],
    LORA: ["method=lora"],
    PROBE: ["method=linear_probe"],
}
FEW_ARMS = (UNITS, FIRST, LORA, PROBE)
COUNTS = (16, 64, 256)
WRONG = (0.0, 0.1)
FEW_STEPS = {16: (40, 16), 64: (40, 32), 256: (40, 64)}
"""Steps and rows of a batch, by labelled pictures of a class."""
SHIFT = "data.where={train: {cell: mono}, validation: {cell: mono}, test: {cell: poly}}"
SHARED = (
    "launch.threads=1", "launch.device=cpu", "training.precision=bf16", "training.eval_every=end",
    "training.save_every=1000000", "training.keep_best=false", "training.baselines=false",
    "training.eval_batch_size=64",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A model: its recipe, how many of its last blocks are adapted, LoRA's places in them, the rank at which it trains
    as much as the adapters do, and the steps of a run."""

    title: str
    recipe: str
    blocks: int
    lora: str
    rank: int
    steps: int


BASES = {
    "vit": Base(
        "ViT-S/14, last 4 of 12 blocks", "vit/elpv_linear_probe", 4,
        r".*layers\.(8|9|10|11)\.attention\.[qv]_proj", 32, 60,
    ),
    "resnet": Base(
        "ResNet-50 of half width, last 3 of 16 blocks", "resnet/elpv_linear_probe", 3,
        r".*stages\.3\..*convolution", 12, 100,
    ),
}  # fmt: skip


class Bench:
    """A job for each arm in each condition.

    Args:
        out: Folder of the results.
        full: The large size.
    """

    def __init__(self, out: Path, full: bool):
        self.factor, self.full = 5 if full else 1, full
        self.store = Store(out / f"evidence_sparse{'.full' if full else ''}.jsonl")

    def job(self, base: str, arm: str, rate: float, seed: int, case: str = "all") -> tuple[Any, ...]:
        """What `scored` is called with."""
        found, few = BASES[base], FEW.get(case)
        steps, batch = FEW_STEPS[few[0]] if few else (found.steps, BATCH)
        place = [f"method.last_blocks={found.blocks}"] if arm in (FIRST, UNITS, WEIGHTS) else []
        if arm == LORA:
            place = [f"method.targets=['{found.lora}']", f"method.r={found.rank}", f"method.alpha={2 * found.rank}"]
        guarded = few is not None and arm == UNITS
        place += ["method.guard=null"] if arm in (UNITS, WEIGHTS) and not guarded else []
        overrides = [
            *ARMS[arm], *place, *SHARED, *([SHIFT] if case == "shift" else []), f"optim.lr={rate}", f"seed={seed}",
            f"training.max_steps={steps * self.factor}", f"training.batch_size={batch}",
        ]  # fmt: skip
        return found.recipe, overrides, Few(*few, seed) if few else None, guarded

    def jobs(self, base: str, case: str, arms: Sequence[str], rates: dict[str, float]) -> dict[str, Any]:
        chosen = product(seeds(case), arms)
        return {
            key(base, case, arm, rates[arm], seed): self.job(base, arm, rates[arm], seed, case) for seed, arm in chosen
        }

    def grid(self, base: str) -> dict[str, Any]:
        chosen = product(ARMS, RATES)
        return {key(base, "all", arm, rate, 0): self.job(base, arm, rate, 0) for arm, rate in chosen}

    def rates(self, base: str) -> dict[str, float]:
        """The rate of each arm with the best validation AUROC."""
        found = self.store.results
        return {
            arm: max(RATES, key=lambda rate, arm=arm: found[key(base, "all", arm, rate, 0)]["validation"])
            for arm in ARMS
        }

    def done(self, base: str, cases: Iterable[str], arms: Sequence[str]) -> bool:
        """Whether all runs of these arms are there."""
        rates = self.rates(base)
        return all(self.jobs(base, case, arms, rates).keys() <= self.store.results.keys() for case in cases)

    def runs(self, base: str, case: str, arm: str) -> list[Result]:
        rate = self.rates(base)[arm]
        return [self.store.results[key(base, case, arm, rate, seed)] for seed in seeds(case)]


FEW = {f"{count}, {wrong:.0%} wrong": (count, wrong) for count, wrong in product(COUNTS, WRONG)}
"""Cases with few labels: how many of a class, and the share of wrong ones."""


def seeds(case: str) -> range:
    return range(MORE_SEEDS if case == "all" else SEEDS)


def key(base: str, case: str, arm: str, rate: float, seed: int) -> str:
    return f"{base}/{case}/{arm}/{rate:g}/{seed}"


def run(bench: Bench, workers: int) -> None:
    """Everything that has no result yet, few labels last."""
    bench.store.run(_joined(bench.grid(base) for base in BASES), workers, scored)
    cases = {"all": list(ARMS), "shift": list(ARMS), **dict.fromkeys(FEW, FEW_ARMS)}
    parts = (bench.jobs(base, case, cases[case], bench.rates(base)) for case, base in product(cases, BASES))
    bench.store.run(_joined(parts), workers, scored)


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return dict(chain.from_iterable(part.items() for part in parts))


def main_table(bench: Bench, base: str, case: str) -> str:
    """An arm a line: AUROC, and how it stands to the dense adapter."""
    rates, dense = bench.rates(base), bench.runs(base, case, FIRST)
    lines = []
    for arm in ARMS:
        runs = bench.runs(base, case, arm)
        gap, low, high = difference(pairs(runs), pairs(dense))
        zero = 1 - mean(run["nonzero"] for run in runs) / dense[0]["nonzero"] if arm in (UNITS, WEIGHTS) else None
        size = mean(run["bytes"] for run in runs)
        lines.append([
            arm, f"{rates[arm]:g}{'*' * (rates[arm] in (min(RATES), max(RATES)))}", _spread(runs),
            "" if arm == FIRST else f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]",
            "" if arm == FIRST else f"{POWER * (high - low) / 2:.3f}",
            "" if arm == FIRST else _verdict(low, high),
            "" if zero is None else f"{zero:.0%}",
            f"{size / 1000:,.0f}", f"{mean(run['bytes'] for run in dense) / size:.1f}",
        ])  # fmt: skip
    head = ["arm", "rate", "AUROC", "less the dense one's", "visible", "by 1 point", "zero", "file, kB", "smaller by"]
    return table(head, lines)


def _verdict(low: float, high: float) -> str:
    if low > -MARGIN:
        return "not worse"
    return "worse" if high < -MARGIN else "not shown"


def _spread(runs: Sequence[Result]) -> str:
    found = [auroc(run["scores"], run["truth"]) for run in runs]
    return f"{mean(found):.3f} ± {stdev(found):.3f}"


def few_table(bench: Bench, base: str) -> str:
    """A number of labels a line, an arm a column: test AUROC, and what training has over it."""
    lines = []
    for case, (count, wrong) in FEW.items():
        line = [str(count), f"{wrong:.0%}"]
        for arm in FEW_ARMS:
            runs = bench.runs(base, case, arm)
            gap = mean(run["train"] - auroc(run["scores"], run["truth"]) for run in runs)
            line.append(f"{_spread(runs)}, {gap:+.2f}")
        lines.append(line)
    return table(["labels a class", "wrong", *FEW_ARMS], lines)


def few_verdicts(bench: Bench, base: str) -> str:
    """The sparse adapter's lead over the others, all cases together."""
    lines = []
    for arm in FEW_ARMS[1:]:
        found = [difference(pairs(bench.runs(base, c, UNITS)), pairs(bench.runs(base, c, arm))) for c in FEW]
        shown = ", ".join(f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]" for gap, low, high in found)
        lines.append(f"- over {arm}: {shown}")
    sparse = [run for case in FEW for run in bench.runs(base, case, UNITS)]
    held = sum(any("back to" in note for note in run["notes"]) for run in sparse)
    told = f"The guard took pruning back in {held} of {len(sparse)} runs."
    return "\n".join([f"The lead of {UNITS!r}, by line of the table:", "", *lines, "", told])


def bars(bench: Bench, base: str) -> str:
    """Whether the two bars are passed."""
    dense, lines = bench.runs(base, "all", FIRST), []
    for arm in (UNITS, WEIGHTS):
        runs = bench.runs(base, "all", arm)
        _, low, _ = difference(pairs(runs), pairs(dense))
        ratio = mean(run["bytes"] for run in dense) / mean(run["bytes"] for run in runs)
        good = "not worse by 1 point" if low > -MARGIN else "not shown to be within 1 point"
        size = f"{ratio:.1f} times smaller, {'' if ratio >= BAR else 'less than '}the {BAR} that were asked for"
        lines.append(f"- {arm}: {good} (lower end {low:+.3f}); file {size}")
    return "\n".join(lines)


ABOUT = """\
Solar cells (ELPV), sound or defective, 112 pixels, no augmentation, bf16, one thread; {more} seeds, and {seeds} where
cells shift or labels are few. Train (1,796 pictures), validation (300) and test (528) are of different modules: within
one, cells are near copies. Of the cells of a test module one says something about the others, which the intervals leave
out: for new modules they are too narrow.

- Arms: adapters of 32 units after attention and MLP (ViT) or after the block (ResNet), the same dense and pruned; LoRA
  on q and v, or on the convolutions, of the same blocks, with as many parameters; a linear head alone.
- Rate: the best of {rates} by validation with the first seed; with a star it is an end of the grid, so another might do
  better still.
- AUROC: of the test split, mean and standard deviation over seeds. Less the dense one's: with a 95 % interval (paired
  bootstrap over seeds and over the rows of each kind). Visible: the difference that four such tests in five would have
  seen. By 1 point: not worse where the interval lies above -{margin}, worse where it lies below.
- Zero: share of the dense adapter's weights that are zero in the end; the penalty may take more than the budget.
- File: all that is saved, the head too.
"""
FEW_ABOUT = """\
Few labels: so many pictures of each class, drawn anew for each seed. {back:.0%} of them are for validation, at random
among the same modules, as one who labels few pictures would; only the guard reads them. Wrong: this share of the labels
of each class is turned around, in training and validation. Rates are those from above, which who has few labels could
not have found. After the AUROC: the training rows' own, by the labels they were given, less the test's."""


def report(bench: Bench) -> str:
    """The tables with what they can say; those whose runs are not all there yet are named instead."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    parts, missing = [ABOUT.format(more=MORE_SEEDS, seeds=SEEDS, rates=rates, margin=MARGIN).strip()], []
    for name, base in BASES.items():
        parts += [f"{base.title}: {base.steps * bench.factor} steps of {BATCH}.", main_table(bench, name, "all")]
        parts.append(bars(bench, name))
        if bench.done(name, ["shift"], list(ARMS)):
            parts += [
                "Trained on mono-crystalline cells, tested on poly-crystalline ones:",
                main_table(bench, name, "shift"),
            ]
        else:
            missing.append(f"{base.title}, other cells")
    parts.append(FEW_ABOUT.format(back=KEPT_BACK))
    for name, base in BASES.items():
        if bench.done(name, FEW, FEW_ARMS):
            parts += [f"{base.title}:", few_table(bench, name), few_verdicts(bench, name)]
        else:
            missing.append(f"{base.title}, few labels")
    parts += [f"Not run to the end yet: {'; '.join(missing)}."] if missing else []
    ours, size = "python scripts/evidence_sparse.py", " --size full" if bench.full else ""
    return "\n\n".join([*parts, here(f"{ours} run{size} && {ours} table{size}")])


if __name__ == "__main__":
    command(__doc__, Bench, run, report, README)
