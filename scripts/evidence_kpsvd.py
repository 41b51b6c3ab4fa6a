"""KPSVD against what it has to beat, on SmolLM2-135M: the tables in peftcli/methods/kpsvd/README.md.

    python scripts/evidence_kpsvd.py run --out build      # resumable
    python scripts/evidence_kpsvd.py table --out build    # writes the tables from build/evidence_kpsvd.jsonl

Needs the samples smollm2-135m, wordnet and gsm8k-test. All arms adapt q and v and get the same rows, steps and grid of
learning rates, chosen for each by validation loss with the first seed. `--size full` takes ten times the steps, all
test rows and five seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from evidence import Result, Store, command, difference, here, table
from evidence_loss import SMOOTHED, costs, losses, per_token, reached, smooth, unevenness, untouched

from peftcli.config.paths import sample_folder

README = Path(__file__).resolve().parent.parent / "peftcli/methods/kpsvd/README.md"
RECIPE = "smollm2/wordnet-gloss_lora"
RATES = (1e-3, 3e-3, 1e-2)
BUDGET = 460_800
"""Parameters of LoRA of rank 8 on q and v."""
SHORT = 350
"""Characters of the longest GSM8K problem with its answer, in the small size."""
MARGIN = 0.05
"""Share of what LoRA gains over the base by which fewer parameters may be worse."""
POWER = 2.80 / 1.96
"""From half a 95 % interval to the difference that is seen four times in five."""
FIRST = "LoRA, rank 8"
COSTS = "gsm8k"
"""The case whose steps are timed."""


ABOUT = """\
SmolLM2-135M-Instruct, q and v, bf16, one thread, {seeds} seeds (data order, and what an arm draws at its start). Each
arm has its best rate of {rates} by validation loss with the first seed; with a star it is an end of the grid, so
another might do better still.

- Test loss: nats a token of the answers, mean and standard deviation over seeds.
- Less LoRA's: with a 95 % interval (paired bootstrap over seeds and rows; with so few seeds a little too narrow).
  Visible: the difference that four such tests in five would have seen.
- Steps to LoRA's end: when the training loss, less the base's on the same batch, mean of the last {smoothed:.0f} % of
  all steps, is where LoRA's is after the last step with that seed; median over seeds.
- CV: standard deviation over mean of the gradient norm before clipping, without the first tenth of the steps.
- Step: median, and its ratio to LoRA's, both in turn in one process. Peak: largest resident memory during steps, in a
  process of its own.
- LoKr has the rank, factor and scale of PEFT's own comparison. KPSVD, auto has no budget but the default bound on the
  predicted loss.
- Not worse: the interval's upper end lies below {margin:.0f} % of what LoRA gains over the base.

A model of this size solves next to no problem of GSM8K, so the loss of the worked answers is the measure; numbers from
this cut are not GSM8K numbers."""


def kpsvd(*settings: str) -> list[str]:
    return ["method=kpsvd", *settings]


def tuner(kind: str, args: str) -> list[str]:
    return ["method=peft", f"method.type={kind}", f"method.args={{{args}}}"]


ARMS = {
    FIRST: ["method=lora", "method.r=8", "method.alpha=16"],
    "PiSSA, rank 8": ["method=lora", "method.r=8", "method.alpha=8", "method.init=pissa"],
    "LoKr, rank 32, factor 4": tuner("LOKR", "r: 32, alpha: 64, decompose_factor: 4"),
    "SHiRA, rank 8": tuner("SHIRA", "r: 8"),
    "KPSVD, auto": kpsvd("method.rank=auto"),
    "KPSVD, auto, LoRA's budget": kpsvd("method.rank=auto", f"method.budget={BUDGET}"),
    "KPSVD, rank 8": kpsvd("method.rank=8"),
    "KPSVD, auto, 25 % fewer": kpsvd("method.rank=auto", f"method.budget={BUDGET * 3 // 4}"),
    "KPSVD, rank 6": kpsvd("method.rank=6"),
}


@dataclass(frozen=True)
class Case:
    """What is learnt, from which rows, in how many steps."""

    title: str
    overrides: list[str]
    steps: int
    batch: int
    rows: dict[str, int]

    def job(self, steps: int | None = None) -> list[str]:
        """Overrides that all arms share."""
        rows = ", ".join(f"{split}: {count}" for split, count in self.rows.items())
        return [
            *self.overrides, f"data.rows={{{rows}}}", f"training.max_steps={steps or self.steps}",
            f"training.batch_size={self.batch}", "task.template=plain", "task.max_length=512", "task.generated_rows=0",
            "launch.threads=1", "launch.device=cpu", "training.precision=bf16", "training.eval_every=end",
            "training.save_every=1000000", "training.keep_best=false", "training.baselines=false",
        ]  # fmt: skip


class Bench:
    """The two cases, and a job for each arm on them.

    Args:
        out: Folder of rows and results.
        full: The large size.
    """

    def __init__(self, out: Path, full: bool):
        self.seeds = range(5 if full else 3)
        self.full, self.data = full, out / f"evidence_kpsvd{'.full' if full else ''}.data"
        self.store = Store(out / f"evidence_kpsvd{'.full' if full else ''}.jsonl")
        factor, every = (10, 10**6) if full else (1, 0)
        gloss = ['task.prompt="{word} ({pos}):"', 'task.completion=" {definition}"']
        problems = [
            "data=files", f"data.files.train={self.data}/train.parquet", f"data.files.test={self.data}/test.parquet",
            'task.prompt="Question: {question}\\nAnswer:"', 'task.completion=" {answer}"',
        ]  # fmt: skip
        self.cases = {
            "gloss": Case(
                "Word to meaning (WordNet's definitions)", gloss, 28 * factor, 8,
                {"train": 400 * factor, "validation": every or 80, "test": every or 200},
            ),
            "gsm8k": Case(
                "GSM8K (our cut of its public test problems: 1,000 to train, 319 to test)", problems, 16 * factor, 4,
                {"train": every or 1000, "validation": every or 16, "test": every or 56},
            ),
        }  # fmt: skip

    def write_rows(self) -> None:
        """GSM8K's problems; in the small size the short ones, so that none has to be cut to save time."""
        self.data.mkdir(parents=True, exist_ok=True)
        for part in ("train", "test"):
            rows = pq.read_table(sample_folder("gsm8k-test") / f"{part}.parquet")
            lengths = [len(row["question"]) + len(row["answer"]) for row in rows.to_pylist()]
            kept = [place for place, length in enumerate(lengths) if self.full or length <= SHORT]
            pq.write_table(rows.take(kept), self.data / f"{part}.parquet")

    def job(self, case: str, arm: str, rate: float, seed: int) -> tuple[str, list[str]]:
        """The recipe and its overrides."""
        return RECIPE, [*self.cases[case].job(), *adapted(arm), f"optim.lr={rate}", f"seed={seed}"]

    def jobs(self, case: str, rates: dict[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, Any]:
        return {
            key(case, arm, rate, seed): self.job(case, arm, rate, seed)
            for arm in ARMS
            for rate in rates[arm]
            for seed in seeds
        }

    def rates(self, case: str) -> dict[str, float]:
        """The rate of each arm with the lowest validation loss."""
        found, seed = self.store.results, self.seeds[0]
        return {
            arm: min(RATES, key=lambda rate, arm=arm: found[key(case, arm, rate, seed)]["validation"]) for arm in ARMS
        }

    def runs(self, case: str, arm: str) -> list[Result]:
        rate = self.rates(case)[arm]
        return [self.store.results[key(case, arm, rate, seed)] for seed in self.seeds]

    def bases(self, case: str) -> list[Result]:
        return [self.store.results[f"{case}/base/{seed}"] for seed in self.seeds]


def key(case: str, arm: str, rate: float, seed: int) -> str:
    return f"{case}/{arm}/{rate:g}/{seed}"


def adapted(arm: str) -> list[str]:
    return [*ARMS[arm], "method.targets=[attention.q,attention.v]"]


def run(bench: Bench, workers: int) -> None:
    """Everything that has no result yet; costs one at a time, so that nothing of ours runs beside them."""
    bench.write_rows()
    for name, case in bench.cases.items():
        bench.store.run(bench.jobs(name, dict.fromkeys(ARMS, RATES), bench.seeds[:1]), workers, losses)
        chosen = {arm: [rate] for arm, rate in bench.rates(name).items()}
        bench.store.run(bench.jobs(name, chosen, bench.seeds), workers, losses)
        bases = {f"{name}/base/{seed}": (RECIPE, [*case.job(), f"seed={seed}"]) for seed in bench.seeds}
        bench.store.run(bases, workers, untouched)
    steps = {arm: [*bench.cases[COSTS].job(1000), *adapted(arm)] for arm in ARMS}
    bench.store.run({f"cost/{arm}": (RECIPE, steps[arm], steps[FIRST]) for arm in ARMS}, 1, costs, fresh=True)


def case_table(bench: Bench, case: str) -> str:
    """An arm a line."""
    rates, bases, tokens = bench.rates(case), bench.bases(case), bench.bases(case)[0]["tokens"]
    theirs = per_token(bench.runs(case, FIRST), tokens)
    goals = [smooth(run, base)[-1] for run, base in zip(bench.runs(case, FIRST), bases, strict=True)]
    lines = [["untouched base", "0", "", f"{per_token(bases[:1], tokens).mean():.3f}", *[""] * 4]]
    for arm in ARMS:
        runs = bench.runs(case, arm)
        ours = per_token(runs, tokens)
        gap, low, high = difference(ours, theirs)
        steps = median(reached(run, base, goal) for run, base, goal in zip(runs, bases, goals, strict=True))
        lines.append([
            arm, _span([run["trained"] for run in runs]),
            f"{rates[arm]:g}{'*' * (rates[arm] in (min(RATES), max(RATES)))}",
            f"{ours.mean():.3f} ± {stdev(ours.mean(1)):.3f}",
            "" if arm == FIRST else f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]",
            "" if arm == FIRST else f"{POWER * (high - low) / 2:.3f}",
            f"{steps:.0f}" if np.isfinite(steps) else "never",
            f"{mean(map(unevenness, runs)):.2f}",
        ])  # fmt: skip
    head = ["arm", "trained", "rate", "test loss", "less LoRA's", "visible", "steps to LoRA's end", "CV"]
    return table(head, lines)


def cost_table(bench: Bench) -> str:
    """What a step and a saved adapter take."""
    lines = []
    for arm in ARMS:
        cost, size = bench.store.results[f"cost/{arm}"], bench.runs(COSTS, arm)[0]["bytes"]
        lines.append([
            arm, f"{cost['seconds']:.2f}", f"{cost['ratio']:.2f}", f"{cost['peak'] / 1e6:,.0f}", f"{size / 1e6:.2f}",
        ])  # fmt: skip
    return table(["arm", "step, s", "/ LoRA's in turn", "peak memory, MB", "adapter file, MB"], lines)


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def verdicts(bench: Bench, case: str) -> str:
    """Whether the arms with at most three quarters of LoRA's parameters are not worse than it."""
    base, first = bench.bases(case)[0], bench.runs(case, FIRST)
    theirs = per_token(first, base["tokens"])
    margin = MARGIN * float(per_token([base], base["tokens"]).mean() - theirs.mean())
    lines = []
    for arm in ARMS:
        runs = bench.runs(case, arm)
        if max(run["trained"] for run in runs) <= 0.75 * first[0]["trained"]:
            high = difference(per_token(runs, base["tokens"]), theirs)[2]
            said = "not worse" if high < margin else "not shown to be as good"
            lines.append(f"- {arm}: {said} (upper end {high:+.3f}, allowed {margin:+.3f})")
    return "\n".join(["At most three quarters of LoRA's parameters:", "", *lines])


def report(bench: Bench) -> str:
    """The tables with what they can say."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    parts = [ABOUT.format(seeds=len(bench.seeds), rates=rates, smoothed=100 * SMOOTHED, margin=100 * MARGIN)]
    for name, case in bench.cases.items():
        short = "" if bench.full or name != "gsm8k" else f", problems of at most {SHORT} characters with their answers"
        count = len(bench.bases(name)[0]["rows"])
        parts += [
            f"{case.title}{short}: {case.steps} steps of {case.batch} rows, {count} test rows.",
            case_table(bench, name), verdicts(bench, name),
        ]  # fmt: skip
    batch = bench.cases[COSTS].batch
    parts += [f"Cost of a step of {batch} of these problems, and of the file:", cost_table(bench)]
    ours, size = "python scripts/evidence_kpsvd.py", " --size full" if bench.full else ""
    return "\n\n".join([*parts, here(f"{ours} run{size} && {ours} table{size}")])


if __name__ == "__main__":
    command(__doc__, Bench, run, report, README)
