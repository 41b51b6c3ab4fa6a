"""SDT against what it has to beat, on WordNet's 45 categories: the tables in peftcli/methods/sdt/README.md.

    python scripts/evidence_sdt.py run --out build      # resumable; build/mamba-{small,medium} by pretrain_mamba.py
    python scripts/evidence_sdt.py table --out build    # writes the tables from build/evidence_sdt.jsonl

Every arm gets the same grid of learning rates, chosen for it by validation on a tenth of the labels over all seeds, and
the same steps. LoRA's ranks are those whose number of trained parameters is nearest to SDT's. `--size full` takes the
bundled model for all arms and five times the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from evidence import Result, Store, answers, command, difference, here, points, table

from peftcli.config import paths
from peftcli.methods.sdt.maths import jaccard

README = Path(__file__).resolve().parent.parent / "peftcli/methods/sdt/README.md"
SEEDS = range(5)
RATES = (3e-3, 1e-2, 3e-2)
STEPS = {"all": 200, "tenth": 100, "hundredth": 50, "wrong": 200}
CONDITIONS = {"all": "all labels", "tenth": "10 %", "hundredth": "1 %", "wrong": "all, a tenth of them wrong"}
SHARES = (0.01, 0.05, 0.25, 1.0)
MARGIN = 0.02
"""Accuracy by which fewer channels may be worse."""
SDT = ["method=sdt", "method.channels=0.05", "method.states=4", "method.lora_targets=[ssm.out]"]
SELECTORS = {
    "taylor": [],
    "magnitude, 10 % warm-up": ["method.selector=magnitude", "method.warmup=0.1"],
    "abar, 10 % warm-up": ["method.selector=abar", "method.warmup=0.1"],
    "random": ["method.selector=random"],
}


def lora(rank: int, *targets: str) -> list[str]:
    return ["method=lora", f"method.r={rank}", f"method.alpha={rank}", f"method.targets=[{','.join(targets)}]"]


ARMS = {
    **{f"SDT, {name}": [*SDT, *selector] for name, selector in SELECTORS.items()},
    "LoRA, same projections (out)": lora(9, "ssm.out"),
    "LoRA on in": lora(5, "ssm.in"),
    "LoRA on x and dt": lora(6, "ssm.x", "ssm.dt"),
    "full fine-tuning": ["method=full"],
    "linear probe": ["method=linear_probe", "task.head=linear"],
}
KEY_ARMS = ("SDT, taylor", "SDT, random", "LoRA, same projections (out)", "full fine-tuning")
Jobs = dict[str, tuple[str, list[str]]]


class Bench:
    """The conditions as files, and a job for each arm on them.

    Args:
        bases: Folder of the pre-trained small and medium models; files and results go there too.
        full: Five times the steps.
    """

    def __init__(self, bases: Path, full: bool):
        self.factor = 5 if full else 1
        self.data = bases / "evidence_sdt.data"
        self.models = {"small": bases / "mamba-small", "medium": bases / "mamba-medium"}
        self.models["bundled"] = paths.bundled("mamba-wordnet")
        self.store = Store(bases / f"evidence_sdt{'.full' if full else ''}.jsonl")
        self.main = "bundled" if full else "small"

    def write_rows(self) -> None:
        """The training rows of each condition; validation and test stay as they are."""
        self.data.mkdir(parents=True, exist_ok=True)
        rows = pq.read_table(paths.bundled("wordnet-categories") / "train.parquet")
        labels = np.array(rows["label"].to_pylist())
        generator = np.random.default_rng(0)
        wrong = labels.copy()
        chosen = generator.random(len(labels)) < 0.1
        wrong[chosen] = [generator.choice(np.setdiff1d(labels, [label])) for label in labels[chosen]]
        changed = rows.set_column(rows.column_names.index("label"), "label", pa.array(wrong))
        parts = {"all": rows, "wrong": changed, **{name: rows.take(_share(labels, n)) for name, n in PARTS.items()}}
        for name, part in parts.items():
            pq.write_table(part, self.data / f"{name}.parquet")

    def job(self, model: str, condition: str, arm: Sequence[str], rate: float, seed: int) -> tuple[str, list[str]]:
        """The recipe and its overrides."""
        held_out = paths.bundled("wordnet-categories")
        return "quickstart", [
            "model.source=folder", f"model.name={self.models[model]}", "~model.shape", "data=files",
            f"data.files.train={self.data / condition}.parquet",
            f"data.files.validation={held_out / 'validation.parquet'}", f"data.files.test={held_out / 'test.parquet'}",
            "data.rows={validation: 500, test: 1000}", "task.max_length=48", "launch.threads=1", "launch.device=cpu",
            "training.precision=fp32", f"training.max_steps={STEPS[condition] * self.factor}", "training.batch_size=16",
            "training.group_by_length=true", "training.eval_every=end", "training.keep_best=false",
            "training.baselines=false", *arm, f"optim.lr={rate}", f"seed={seed}",
        ]  # fmt: skip

    def jobs(self, model: str, condition: str, arms: dict[str, list[str]], rates: dict[str, float]) -> Jobs:
        return {
            key(model, condition, name, rates[name], seed): self.job(model, condition, arm, rates[name], seed)
            for name, arm in arms.items()
            for seed in SEEDS
        }

    def grid(self, arms: dict[str, list[str]]) -> Jobs:
        return {
            key(self.main, "tenth", name, rate, seed): self.job(self.main, "tenth", arm, rate, seed)
            for name, arm in arms.items()
            for rate in RATES
            for seed in SEEDS
        }

    def rates(self) -> dict[str, float]:
        """The rate of each arm with the best validation accuracy."""

        def quality(name: str, rate: float) -> float:
            found = [self.store.results[key(self.main, "tenth", name, rate, seed)] for seed in SEEDS]
            return mean(result["validation"] for result in found)

        return {name: max(RATES, key=lambda rate: quality(name, rate)) for name in ARMS}

    def runs(self, model: str, condition: str, name: str, rate: float) -> list[Result]:
        return [self.store.results[key(model, condition, name, rate, seed)] for seed in SEEDS]


PARTS = {"tenth": 0.1, "hundredth": 0.01}


def key(model: str, condition: str, arm: str, rate: float, seed: int) -> str:
    return f"{model}/{condition}/{arm}/{rate:g}/{seed}"


def by_share() -> dict[str, list[str]]:
    """SDT with more and more channels."""
    return {f"share {share:g}": [*SDT, "method.selector=taylor", f"method.channels={share}"] for share in SHARES}


def _share(labels: np.ndarray, share: float) -> list[int]:
    """Rows of a share of each label, at least one, so that every class can be learnt."""
    generator = np.random.default_rng(1)
    kept: list[int] = []
    for label in np.unique(labels):
        of_label = generator.permutation(np.flatnonzero(labels == label))
        kept += of_label[: max(1, round(share * len(of_label)))].tolist()
    return sorted(kept)


def run(bench: Bench, workers: int) -> None:
    """Everything that has no result yet, what others build on first."""
    bench.write_rows()
    bench.store.run(bench.grid(ARMS), workers)
    rates = bench.rates()
    for condition in CONDITIONS:
        bench.store.run(bench.jobs(bench.main, condition, ARMS, rates), workers)
    shares, rate = by_share(), dict.fromkeys(by_share(), rates["SDT, taylor"])
    for model in bench.models:
        bench.store.run(bench.jobs(model, "tenth", shares, rate), workers)
    arms = {name: ARMS[name] for name in KEY_ARMS}
    for condition in ("tenth", "all"):
        bench.store.run(bench.jobs("bundled", condition, arms, rates), workers)


def main_table(bench: Bench, model: str, names: Sequence[str], conditions: Sequence[str]) -> str:
    """Accuracy of each arm, and what SDT with the default selector has over it, by condition."""
    rates, first = bench.rates(), "SDT, taylor"
    head = ["arm", "trained", "rate"]
    for condition in conditions:
        head += [CONDITIONS[condition], "taylor's lead"]
    rows = []
    for name in names:
        line = [
            name,
            f"{bench.runs(model, conditions[0], name, rates[name])[0]['trained']:,}",
            f"{rates[name]:g}{'*' * (rates[name] == max(RATES))}",
        ]
        for condition in conditions:
            theirs = answers(bench.runs(model, condition, name, rates[name]))
            ours = answers(bench.runs(model, condition, first, rates[first]))
            line.append(f"{100 * theirs.mean():.1f} ± {100 * theirs.mean(1).std(ddof=1):.1f}")
            line.append("" if name == first else points(difference(ours, theirs)))
        rows.append(line)
    return table(head, rows)


def share_table(bench: Bench) -> str:
    """For each size of base, accuracy by share of channels, and the smallest share that is not worse than all."""
    rate = bench.rates()["SDT, taylor"]
    rows = []
    for model in bench.models:
        by = {share: answers(bench.runs(model, "tenth", f"share {share:g}", rate)) for share in SHARES}
        enough = [share for share in SHARES if difference(by[share], by[1.0])[1] > -MARGIN]
        line = [model, *(f"{100 * by[share].mean():.1f}" for share in SHARES)]
        least = f"{min(enough):.0%}"
        rows.append([*line, points(difference(by[SHARES[0]], by[1.0])), least])
    head = ["base", *(f"{share:.0%} of the channels" for share in SHARES), "1 % against all", "smallest not worse"]
    return table(head, rows)


def overlap(bench: Bench) -> str:
    """Jaccard overlap of the chosen channels between seeds, and what chance would give."""
    rates, rows = bench.rates(), []
    for name in (f"SDT, {selector}" for selector in SELECTORS):
        runs = bench.runs(bench.main, "tenth", name, rates[name])
        found = [
            jaccard(one["channels"][layer], other["channels"][layer])
            for one, other in combinations(runs, 2)
            for layer in one["channels"]
        ]
        cost = mean(result["attach_seconds"] / result["seconds"] for result in runs)
        rows.append([name, f"{mean(found):.2f}", f"{cost:.1%}"])
    return table(["selector", "overlap of the channels of two seeds", "start (checks and calibration) / run"], rows)


def report(bench: Bench) -> str:
    """The tables with what they can say."""
    rates = bench.rates()
    taylor = answers(bench.runs(bench.main, "tenth", "SDT, taylor", rates["SDT, taylor"]))
    chance = answers(bench.runs(bench.main, "tenth", "SDT, random", rates["SDT, random"]))
    _, low, high = difference(taylor, chance)
    steps = ", ".join(f"{STEPS[name] * bench.factor} with {shown}" for name, shown in CONDITIONS.items())
    seen = 100 * (high - low) / 2
    parts = [
        f"Accuracy in %, mean and standard deviation over {len(SEEDS)} seeds, 1,000 test rows; differences in points "
        "with 95 % intervals (paired bootstrap over seeds and rows; with five seeds they are a little too narrow). "
        f"A difference of less than about {seen:.1f} points would not have been seen. Steps of 16 rows: {steps}. The "
        f"rate is each arm's best of {', '.join(f'{rate:g}' for rate in RATES)} by validation with 10 % of the labels; "
        "with a star it is the largest, so a larger one might do better still.",
        f"Base `{bench.main}`:",
        main_table(bench, bench.main, list(ARMS), list(CONDITIONS)),
        "The bundled base, same rates:",
        main_table(bench, "bundled", KEY_ARMS, ["all", "tenth"]),
        f"Do larger bases need a smaller share of channels? SDT (taylor), 10 % of the labels; not worse means that the "
        f"interval's lower end lies above {-100 * MARGIN:.0f} points.",
        share_table(bench),
        overlap(bench),
        here("python scripts/evidence_sdt.py run && python scripts/evidence_sdt.py table"),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    command(__doc__, Bench, run, report, README)
