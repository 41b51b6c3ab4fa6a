"""SMAT against pre-trained prototypes and dense meta-tuning, on few-shot tasks of pictures: the tables in
peftcli/methods/smat/README.md.

    python scripts/evidence_smat.py run --out build --workers 1    # resumable
    python scripts/evidence_smat.py table --out build              # writes the tables from build/evidence_smat.jsonl

Needs the samples resnet50-thin, emoji-google, emoji-twitter, glyphs, digits and elpv. The model is the first three
stages of resnet50-thin, cut off once. Every arm gets the same tasks and steps and three learning rates, of which the
tasks of validation classes choose with the first seed. `--size full` has 600 tasks of each domain and five times the
steps, and fine-tunes 50 tasks from each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from evidence import Result, command, here, points, table
from evidence_episodes import (
    CONDITIONS,
    NOISE,
    WRONG,
    Scores,
    damaged,
    difference,
    fine_tuned,
    meta_trained,
    step_times,
    tested,
)
from evidence_smat_runs import (
    ARMS,
    DAMAGED,
    DENSE,
    FINE,
    FINE_STEPS,
    FIRST,
    KEPT,
    LAST,
    LONG,
    LONG_META,
    LONGER,
    META,
    OTHERS,
    OTHERWISE,
    PRE,
    RATES,
    RECIPE,
    SEEDS,
    SMAT,
    Bench,
    cut_off,
    rates_of,
)

README = Path(__file__).resolve().parent.parent / "peftcli/methods/smat/README.md"
SLOWER = 2.2
"""How much longer than a dense step one of SMAT may take."""


def run(bench: Bench, workers: int) -> None:
    """Everything that has no result yet; what the bars are about first, fine-tuning last."""
    cut_off(bench.out / "evidence_smat.base")
    store = bench.store

    def go(work: Callable[..., Result], *parts: dict[str, Any]) -> None:
        store.run({name: job for part in parts for name, job in part.items()}, workers, work)

    go(meta_trained, bench.grid([PRE, *FIRST]))
    go(meta_trained, bench.seeds(FIRST))
    go(tested, bench.jobs("test", [PRE, *FIRST], range(SEEDS)))
    store.run(bench.step_times(), 1, step_times)
    go(meta_trained, bench.grid(LAST))
    go(meta_trained, bench.seeds(LAST))
    go(tested, bench.jobs("test", LAST, range(SEEDS)))
    go(meta_trained, bench.seeds(OTHERS))
    go(tested, bench.jobs("test", OTHERS, range(SEEDS)))
    go(damaged, bench.jobs("damaged", DAMAGED, range(SEEDS)))
    go(fine_tuned, *(bench.tuned(how) for how in FINE))


def groups(scores: Scores) -> dict[str, list[str]]:
    """Domains of the test: those trained on, of which it has other classes, and others."""
    near = [domain for domain in scores if domain in ("emoji", "glyphs", "digits")]
    return {"in distribution": near, "out of distribution": [domain for domain in scores if domain not in near]}


def part(runs: Sequence[Result], kind: str) -> list[Scores]:
    return [run[kind] for run in runs]


def average(runs: Sequence[Scores], domains: Iterable[str]) -> float:
    """Mean over seeds and domains, in per cent."""
    return 100 * mean(mean(run[domain]) for run in runs for domain in domains)


def gap(ours: Sequence[Scores], theirs: Sequence[Scores], domains: Sequence[str]) -> str:
    """Difference in points with its interval."""
    return points(apart(ours, theirs, domains))


def apart(ours: Sequence[Scores], theirs: Sequence[Scores], domains: Sequence[str]) -> tuple[float, float, float]:
    """Difference and the ends of its interval, over the seeds that both have."""
    both = min(len(ours), len(theirs))
    return difference(ours[:both], theirs[:both], domains)


def main_table(bench: Bench, arms: Sequence[str]) -> str:
    """An arm a line: accuracies, and how it stands to dense meta-tuning and to pre-trained prototypes."""
    dense = {arm: part(bench.runs("test", arm), "clean") for arm in (META, LONG_META)}
    before = part(bench.runs("test", PRE), "clean")
    near, far = groups(before[0]).values()
    lines = []
    for arm in arms:
        runs, like = part(bench.runs("test", arm), "clean"), dense[LONG_META if arm in LAST else META]
        rate, ends = bench.rate(arm), (min(rates_of(arm)), max(rates_of(arm)))
        lines.append([
            arm, "" if arm == PRE else f"{rate:g}{'*' * (rate in ends and arm not in OTHERS)}",
            "" if arm == PRE else str(len(runs)), f"{average(runs, near):.1f}", f"{average(runs, far):.1f}",
            *(["", ""] if arm in dense else [gap(runs, like, near), gap(runs, like, far)]),
            "" if arm == PRE else gap(runs, before, far),
        ])  # fmt: skip
    head = ["arm", "rate", "seeds", "ID", "OOD", "ID less dense", "OOD less dense", "OOD less pre-trained"]
    return table(head, lines)


def domain_table(bench: Bench, arms: Sequence[str]) -> str:
    """A domain a line, an arm a column."""
    found = {arm: part(bench.runs("test", arm), "clean") for arm in arms}
    names = [(domain, kind) for kind, domains in groups(found[arms[0]][0]).items() for domain in domains]
    lines = [[domain, kind, *(f"{average(found[arm], [domain]):.1f}" for arm in arms)] for domain, kind in names]
    return table(["domain", "", *arms], lines)


def sparsity_table(bench: Bench, arms: Sequence[str]) -> str:
    """The least sparse expert of all seeds, what no expert changes, and how sharply tasks choose."""
    lines = []
    for arm in arms:
        runs = bench.runs("test", arm)
        least = min(min(run["sparsity"]) for run in runs)
        spread = max(max(w) - min(w) for run in runs for w in zip(*run["experts"].values(), strict=True))
        lines.append([arm, f"{least:.1%}", f"{mean(run['union'] for run in runs):.1%}", f"{spread:.3f}"])
    head = ["arm", "least sparse expert", "no expert changes", "an expert's weight differs between domains by up to"]
    return table(head, lines)


def damaged_table(bench: Bench) -> str:
    """A condition a line of each group of domains: accuracies, and SMAT less the others."""
    lines = []
    for how in CONDITIONS[1:]:
        found = {arm: part(bench.runs("damaged", arm), how) for arm in DAMAGED}
        for kind, domains in groups(found[LONG][0]).items():
            ours, others = found[LONG], [found[LONG_META], found[PRE]]
            lines.append([
                how, kind, *(f"{average(found[arm], domains):.1f}" for arm in DAMAGED),
                *(gap(ours, one, domains) for one in others),
            ])  # fmt: skip
    return table(["support", "domains", *DAMAGED, "SMAT less dense", "SMAT less pre-trained"], lines)


def tuned_table(bench: Bench) -> str:
    """A start a line: accuracies on other domains, direct and fine-tuned, and SMAT's lead after fine-tuning."""
    lines = []
    for how in FINE:
        found = {arm: bench.runs(f"tuned {how}", arm, bench.fine_seeds) for arm in DAMAGED}
        ours = part(found[LONG], "tuned")
        for arm, runs in found.items():
            after, domains = part(runs, "tuned"), list(ours[0])
            lines.append([
                how, arm, ", ".join(f"{run['rate']:g}" for run in runs),
                f"{average(part(runs, 'direct'), domains):.1f}", f"{average(after, domains):.1f}",
                "" if arm == LONG else gap(ours, after, domains),
            ])  # fmt: skip
    return table(["fine-tuned", "from", "rate", "before", "after", "SMAT's less this"], lines)


def bars(bench: Bench) -> str:
    """Whether the bars are passed."""
    before = part(bench.runs("test", PRE), "clean")
    near, far = groups(before[0]).values()
    lines = []
    for dense_arm, arm in (FIRST, LAST):
        if not bench.has("test", arm) or not bench.has("test", dense_arm):
            continue
        steps = f"{bench.steps * (LONGER if arm in LAST else 1)} steps"
        ours, dense = (part(bench.runs("test", one), "clean") for one in (arm, dense_arm))
        for name, other in (("dense meta-tuning", dense), ("pre-trained prototypes", before)):
            found = _, low, high = apart(ours, other, far)
            said = "passed" if low > 0 else "missed: behind" if high < 0 else "missed: cannot be told apart"
            lines.append(f"- {steps}, OOD above {name}: {said} ({points(found)}).")
        found = _, low, high = apart(ours, dense, near)
        said = "passed" if low > 0 else "missed: behind" if high < 0 else "not shown either way"
        lines.append(f"- {steps}, ID not below dense meta-tuning: {said} ({points(found)}).")
    target = target_of(bench)
    least = min(min(run["sparsity"]) for arm in ARMS if arm not in DENSE
                for run in bench.runs("test", arm))  # fmt: skip
    lines.append(
        f"- Each expert at {target:.0%} zeros or more: {'passed' if least >= target else 'missed'} ({least:.2%})."
    )
    for name, size in (("step times", "here"), ("step times, recipe", "of the recipe's own size")):
        if name in bench.store.results:
            ratio, pairs = slower(bench, name)
            said = "passed" if ratio <= SLOWER else "missed"
            told = f"{ratio:.2f}, median of {pairs} pairs of steps {size}, in seconds of one core"
            lines.append(f"- A step at most {SLOWER} times a dense one: {said} ({told}).")
    if less := [name for name in OTHERWISE if f"step times, {name}" in bench.store.results]:
        parts = ", ".join(f"{slower(bench, f'step times, {name}')[0]:.2f} with {name}" for name in less)
        lines.append(f"- What the step is spent on: {parts}.")
    return "\n".join(lines)


def slower(bench: Bench, name: str) -> tuple[float, int]:
    """How many times longer a step takes than a dense one, and how many pairs say so."""
    times = bench.store.results[name]["seconds"]
    return median(b / a for a, b in zip(*times, strict=True)), len(times[0])


def target_of(bench: Bench) -> float:
    """The sparsity that the recipe asks for."""
    from peftcli.config.compose import compose

    return compose(RECIPE, bench.overrides(SMAT, rates_of(SMAT)[0])).config.method.sparsity


ABOUT = """\
The first three stages of resnet50-thin (2.2 million weights), 48 pixels, bf16, one thread; {steps} steps of two tasks
with 5 to 8 classes, at most 30 support rows and 3 query rows a class. Trained on emoji (Google), glyphs, digits and
monocrystalline cells; {seeds} seeds, {tasks} tasks of each domain of the test, the same for every arm and seed.

- ID: accuracy in per cent, mean over the domains that were trained on, by other classes of theirs. OOD: over the
  others.
- Less dense, less pre-trained: with a 95 % interval, paired bootstrap over seeds and over the tasks of each domain. It
  speaks of new tasks of these classes and domains, not of new domains, of which there are few.
- Rate: the best of three by {kept} tasks of each domain on validation classes, with the first seed; of {rates} for
  dense meta-tuning (for longer also half the lowest), of five times as much for SMAT. One or four experts, and no
  teacher, have that of eight. A star: an end of the grid. No test task took part in any choice.
"""
DAMAGED_ABOUT = """\
Damaged supports: {wrong:.0%} of the rows have exchanged their labels with rows of other classes (wrong), or white noise
of {noise} times the pictures' deviation is on them (noisy). Queries are as before."""
TUNED_ABOUT = """\
Fine-tuned from the merged model of a task, other domains only, {steps} AdamW steps on the support, moved by up to four
pixels; {tasks} tasks a domain, {seeds} seed(s). Rate: the best of {rates} on as many validation tasks; LoRA has ten
times as much; 0 leaves the merged model as it is."""


def report(bench: Bench) -> str:
    """The tables with what they can say; those whose runs are not all there yet are named instead."""
    arms = [arm for arm in ARMS if bench.runs("test", arm)]
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    about = ABOUT.format(steps=bench.steps, seeds=SEEDS, tasks=bench.tasks, kept=KEPT, rates=rates)
    parts = [about.strip(), main_table(bench, arms), bars(bench)]
    parts.append(domain_table(bench, [arm for arm in arms if arm in (PRE, *FIRST, *LAST)]))
    parts.append(sparsity_table(bench, [arm for arm in arms if arm not in DENSE]))
    missing = [arm for arm in ARMS if not bench.has("test", arm)]
    if all(bench.has("damaged", arm) for arm in DAMAGED):
        parts += [DAMAGED_ABOUT.format(wrong=WRONG, noise=NOISE), damaged_table(bench)]
    else:
        missing.append("damaged supports")
    if all(bench.has(f"tuned {how}", arm, bench.fine_seeds) for how in FINE for arm in DAMAGED):
        about = TUNED_ABOUT.format(
            steps=FINE_STEPS, tasks=bench.fine_tasks, seeds=len(bench.fine_seeds),
            rates=", ".join(f"{rate:g}" for rate in FINE["full"]),
        )  # fmt: skip
        parts += [about, tuned_table(bench)]
    else:
        missing.append("fine-tuning")
    parts += [f"Not run to the end yet: {'; '.join(missing)}."] if missing else []
    ours, size = "python scripts/evidence_smat.py", " --size full" if bench.full else ""
    return "\n\n".join([*parts, here(f"{ours} run{size} && {ours} table{size}")])


if __name__ == "__main__":
    command(__doc__, Bench, run, report, README)
