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
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import evidence
import evidence_smaller as smaller
import numpy as np
from evidence import Result, command, here, points, table
from evidence_rowcol_runs import ADAPTER_RATES, ARMS, CASES, LONGER, OURS, RATES, SEEDS, SHARES, Bench
from evidence_scores import difference as auroc_difference
from evidence_scores import ranked

README = Path(__file__).resolve().parent.parent / "peftcli/methods/rowcol/README.md"
MARGIN = 0.02
USED = "Used directions of each layer"
"""The figure of a run that counts them."""


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
