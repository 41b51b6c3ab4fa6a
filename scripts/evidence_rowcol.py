"""Models cut down to their row and column spaces, against other ways to make them smaller; cores against LoRA: the
tables in peftcli/methods/rowcol/README.md.

    python scripts/evidence_rowcol.py run --out build --workers 1    # resumable
    python scripts/evidence_rowcol.py table --out build              # what is there, and what is missing

Needs the samples vit-s14, resnet50-thin, elpv, emoji-google, smollm2-135m and wordnet. The small size has few steps on
small pictures, so that all of it takes about an hour on one core; `--size full` takes larger pictures and ten times the
steps. Originals stay in the folder of results, for the arms that begin with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
import evidence_smaller as smaller
import numpy as np
from evidence import Result, Store, command, here, table
from evidence_scores import difference as auroc_difference
from evidence_scores import ranked

README = Path(__file__).resolve().parent.parent / "peftcli/methods/rowcol/README.md"
SEEDS = range(3)
SHARES = (50, 75, 35)
"""Per cent of the backbone's parameters; the first one also for what only it is measured for."""
RATES, ADAPTER_RATES = (3e-5, 1e-4, 3e-4), (1e-3, 3e-3, 1e-2)
MARGIN = 0.02
USED = "Used directions of each layer"
"""The figure of a run that counts them."""
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
    ),
    "vit-emoji": Case(
        "ViT-S/14 on emoji, 56 pixels", "vit/emoji-google_linear_probe", "accuracy",
        ("task.image_size=56", "training.batch_size=32"), ("task.image_size=112", "training.batch_size=32"), 40, (50,),
    ),
    "smollm2": Case(
        "SmolLM2-135M, a word to its meaning", "smollm2/wordnet-gloss_lora", "right tokens",
        ("data.rows={train: 1000, validation: 60, test: 150}", "task.max_length=64", "training.batch_size=8"),
        ("data.rows={train: 4000, validation: 200, test: 400}", "training.batch_size=8"), 25, (50,),
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


def run(bench: Bench, workers: int) -> None:
    """Everything that has no result yet: half of each first, then the other sizes, then adapters."""

    def do(jobs: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        bench.store.run(dict(jobs), workers, _call)

    half = SHARES[0]
    for name in CASES:
        do([bench.original(name, rate, 0) for rate in RATES])
        do([bench.original(name, bench.rate(name), seed) for seed in SEEDS])
        do([bench.arm(name, arm, half, seed) for arm in (*ARMS, LONGER) for seed in SEEDS])
        do([bench.timed(name, *way) for way in CASES[name].ways()])
    for name, case in CASES.items():
        do([bench.arm(name, arm, share, seed) for share in case.shares[1:] for seed in SEEDS for arm in ARMS])
    for name in (name for name, case in CASES.items() if case.ranks):
        do([bench.adapter(name, kind, rate, 0) for kind in range(3) for rate in ADAPTER_RATES])
        do([bench.adapter(name, kind, bench.adapter_rate(name, kind), seed) for kind in range(3) for seed in SEEDS])


def _call(work: Any, *given: Any) -> Result:
    result: Result = work(*given)
    return result


def difference(ours: Sequence[Result], theirs: Sequence[Result], of: str = "after") -> tuple[float, float, float]:
    """Mean difference of the metric with its 95 % interval; `of` says which of theirs."""
    first = ours[0]["after"]
    mine, other = (np.array([run[key]["values"] for run in runs]) for runs, key in ((ours, "after"), (theirs, of)))
    if "truth" not in first:
        return evidence.difference(mine.astype(float), other.astype(float))
    truth = np.array(first["truth"])
    return auroc_difference(ranked(mine, truth), ranked(other, truth))


def points(gap: tuple[float, float, float]) -> str:
    middle, low, high = (100 * x for x in gap)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def spread(runs: Sequence[Result], of: str = "after") -> str:
    found = [100 * smaller.mean(run[of]) for run in runs]
    return f"{mean(found):.1f} ± {stdev(found):.1f}"


def verdict(gap: tuple[float, float, float]) -> str:
    if gap[1] > -MARGIN:
        return "not worse"
    return "worse" if gap[2] < -MARGIN else "not shown"


def main_table(bench: Bench, name: str) -> str:
    """A size and an arm a line: the metric before and after, and how it stands to the original and to ours."""
    start = bench.runs([bench.original(name, bench.rate(name), seed)[0] for seed in SEEDS])
    longer = bench.runs([bench.arm(name, LONGER, SHARES[0], seed)[0] for seed in SEEDS])
    lines = [["original", "100%", "", spread(start), "", "", ""]]
    if longer:
        gap = difference(longer, start)
        lines.append(["original, trained on", "100%", spread(start), spread(longer), points(gap), verdict(gap), ""])
    whole = max(run["trained"] for run in start)
    for share in CASES[name].shares:
        ours = bench.arms(name, OURS, share)
        for arm, title in ARMS.items():
            runs = bench.arms(name, arm, share)
            if not runs:
                continue
            gap = difference(runs, start)
            lead = "" if arm == OURS or not ours else points(difference(ours, runs))
            before = spread(runs, "before")
            lines.append([title, f"{share}%", before, spread(runs), points(gap), verdict(gap), lead])
        if ours:
            before = points(difference(ours, ours, "before"))
            lines.append(["  the first without training", f"{share}%", "", spread(ours, "before"), "", "", before])
    metric = CASES[name].metric
    head = ["made smaller by", "backbone", f"{metric} before", "after", "less the original's", "by 2 points"]
    head.append("ours over it")
    return f"{whole:,} parameters in all.\n\n" + table(head, lines)


def used_table(bench: Bench, name: str) -> str:
    """A kind of layer a line: shares of directions that hold 99 % of the energy, mean and ends."""
    (rows, columns, both), names = _used(bench, name)
    kinds: dict[str, list[int]] = {}
    for place, layer in enumerate(names):
        parts = [part for part in layer.split(".") if not part.isdigit()]
        kinds.setdefault(".".join(parts[-2:]), []).append(place)
    kinds["all, the mean layer utilisation"] = list(range(len(names)))
    lines = [
        [kind, str(len(places)), *(_range([shares[place] for place in places]) for shares in (rows, columns, both))]
        for kind, places in kinds.items()
    ]
    return table(["layers", "", "row space", "column space", "both"], lines)


def _used(bench: Bench, name: str) -> tuple[Any, list[str]]:
    run = bench.store.results[bench.arm(name, OURS, SHARES[0], 0)[0]]
    figure = next(one for one in run["figures"] if one["title"] == USED)
    return figure["y"], figure["names"]


def draw(bench: Bench, names: Sequence[str]) -> Path:
    """A page beside the results, with the used directions of each layer of each model."""
    from peftcli import reports
    from peftcli.reports import figures

    places = [bench.store.results[bench.arm(name, OURS, SHARES[0], 0)[0]]["figures"] for name in names]
    drawn = figures.method([one for found in places for one in found if one["title"] == USED])
    parts = [f"<h2>{CASES[name].title}</h2>{one.svg}" for name, one in zip(names, drawn, strict=True)]
    style = (Path(reports.__file__).parent / "page.css").read_text(encoding="utf-8")
    page = bench.store.path.with_suffix(".html")
    page.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style><main>{''.join(parts)}</main>")
    return page


def _range(shares: Sequence[float]) -> str:
    return f"{mean(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})"


def cost_table(bench: Bench) -> str:
    """A model and a batch a line, at half of the backbone's parameters."""
    lines = []
    there = [
        (
            f"{case.title.split(' on ')[0]}, {pixels} pixels" if pixels else case.title,
            precision,
            bench.timed(name, pixels, precision)[0],
        )
        for name, case in CASES.items()
        if bench.started(name)
        for pixels, precision in case.ways()
    ]
    for title, precision, key in there:
        if key not in bench.store.results:
            continue
        before, after = bench.store.results[key]["rows"]
        held = [sum(row["memory"].values()) for row in (before, after)]
        for size, clock in after["latency"].items():
            first = before["latency"][size]["median"]
            lines.append([
                title, precision, size, f"{first:.1f}", f"{clock['median']:.1f}", f"{1 / clock['ratio']:.2f}",
                str(clock["turns"]), f"{before['flops'] / after['flops']:.2f}",
                f"{held[0] / 1e6:.0f}", f"{held[1] / 1e6:.0f}",
                f"{before['memory']['weights'] / after['memory']['weights']:.2f}",
            ])  # fmt: skip
    head = ["", "arithmetic", "rows", "original, ms", "half, ms", "times faster", "turns", "times fewer operations"]
    return table([*head, "original, MB", "half, MB", "times smaller weights"], lines)


def adapter_table(bench: Bench, name: str) -> str:
    """LoRA, and cores with as many trained numbers and with a tenth."""
    lines, ranks = [], CASES[name].ranks
    assert ranks is not None
    by_kind = [
        bench.runs([bench.adapter(name, kind, bench.adapter_rate(name, kind), seed)[0] for seed in SEEDS])
        for kind in range(3)
    ]
    for kind, (title, runs) in enumerate(zip(("LoRA", "cores", "cores"), by_kind, strict=True)):
        rate = bench.adapter_rate(name, kind)
        gap = "" if kind == 0 else points(difference(runs, by_kind[0]))
        star = "*" * (rate in (min(ADAPTER_RATES), max(ADAPTER_RATES)))
        count = f"{runs[0]['trained']:,}"
        lines.append([f"{title}, rank {ranks[kind]}", count, f"{rate:g}{star}", spread(runs), gap])
    return table(["adapter", "trained numbers", "rate", CASES[name].metric, "less LoRA's"], lines)


ABOUT = """\
{seeds} seeds, bf16, one thread. Solar cells are ELPV's, sound or defective (AUROC; train, validation and test are of
different modules); emoji are of nine categories (accuracy); of a word's meaning it is the share of the tokens that are
likeliest where they stand, the mean over answers. All in points of a hundred, mean and standard deviation over seeds.

- Original: the pretrained model and a new head, all weights trained; the best of the rates {rates} by
  validation with the first seed, for what is made of it too. Each seed has an original of its own.
- Made smaller by: `mode: compress` with `basis: data`; the same with `basis: weight`; the smallest weights of the same
  layers zero for good, so that as many numbers are left (they save no time). All are then trained with half of the
  original's steps and the same distillation (0.5 of the loss KL at temperature 2, blocks' outputs). Before: without.
- Original, trained on: by the steps that what is made smaller has had too, without distillation.
- Less the original's: with a 95 % interval (paired bootstrap over seeds and test rows). By 2 points: not worse where
  the interval lies above -2, worse where it lies below. Ours over it: the first line's lead over this one."""


def report(bench: Bench) -> str:
    """The tables of what is there; what is missing is named."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    parts, missing = [ABOUT.format(seeds=len(SEEDS), rates=rates)], []
    done = []
    for name, case in CASES.items():
        if not bench.started(name) or not bench.arms(name, OURS, SHARES[0]):
            missing.append(case.title)
            continue
        done.append(name)
        steps = case.steps * (10 if bench.full else 1)
        parts += [f"{case.title}; {2 * steps} steps, then {steps}, rate {bench.rate(name):g}.", main_table(bench, name)]
        short = [f"{arm} at {share}%" for share in case.shares for arm in ARMS if not bench.arms(name, arm, share)]
        missing += [f"{case.title}: {', '.join(short)}"] if short else []
    used = "Directions that hold 99 % of the energy of what goes into a layer (row space), of what it puts out (column"
    where = f"Layer by layer they are drawn in `build/{draw(bench, done).name}`."
    parts.append(f"{used} space), and the fewer of both as a share of its smaller side; mean, and the ends. {where}")
    for name in done:
        parts += [f"{CASES[name].title}:", used_table(bench, name)]
    about = "Half of the backbone's parameters against the original, in turn in one process: medians; memory is weights"
    parts += [f"{about} and the most that tensors beside them hold at once with 32 rows.", cost_table(bench)]
    for name, case in CASES.items():
        if case.ranks and bench.has_adapters(name):
            parts += [f"{case.title}, `mode: adapter` against LoRA:", adapter_table(bench, name)]
        elif case.ranks:
            missing.append(f"{case.title}: adapters")
    parts += [f"Not run yet: {'; '.join(missing)}."] if missing else []
    ours, size = "python scripts/evidence_rowcol.py", " --size full" if bench.full else ""
    return "\n\n".join([*parts, here(f"{ours} run{size} --workers 1 && {ours} table{size}")])


if __name__ == "__main__":
    command(__doc__, Bench, run, report, README)
