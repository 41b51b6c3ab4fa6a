"""The loop against a bare PyTorch loop, and the whole command against Transformers' Trainer with PEFT.

    python scripts/benchmark_loop.py overhead            # steps of both loops in turn, in one process
    python scripts/benchmark_loop.py trainer --repeats 3 # whole commands in turn, each in a process of its own
    python scripts/benchmark_loop.py trainer --repeats 1 --assert   # also holds them to the bounds

Case of both: SmolLM2-135M, LoRA r=8 on q and v, 4 rows a step (word -> gloss, chat template), bf16, AdamW. Needs the
samples smollm2-135m and wordnet. Medians; a ratio below 1 means that ours is faster or smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

RECIPE = "smollm2/wordnet-gloss_lora"
STEPS = 60
OVERRIDES = [
    f"training.max_steps={STEPS}", "training.batch_size=4", "training.eval_every=end", "training.baselines=false",
    "training.keep_best=false", "training.precision=bf16", "data.rows={train: 512, validation: 4, test: 4}",
    "task.generated_rows=0", "optim.lr=1e-4", "optim.schedule=linear", "optim.warmup_share=0.0",
]  # fmt: skip
BOUNDS = {"overhead": 1.03, "median step": 0.9, "peak memory": 0.9, "first step": 1.0}


def overhead(steps: int) -> dict[str, float]:
    """Median over pairs of (our step / bare step) on the same batch, the order changing from pair to pair."""
    from contextlib import nullcontext

    import torch

    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.config.compose import compose
    from peftcli.training import checkpoints, prepare
    from peftcli.training.display import Display
    from peftcli.training.loop import Job, StageLoop
    from peftcli.training.signals import StopRequest

    with tempfile.TemporaryDirectory() as folder:
        config = compose(RECIPE, [*OVERRIDES, f"training.max_steps={steps * 2}", f"output={folder}"]).config
        prepare.use_cores(config.launch)
        accelerator = prepare.build_accelerator(config)
        material = prepare.load_material(config)
        loaded = prepare.load_model(config, material, accelerator)
        feed, total = prepare.build_feed(config, material, accelerator)
        attached = prepare.attach(config, loaded, material, feed, total, accelerator)
        run = RunFolder.create(config)
        job = Job(
            config, attached.model, attached.method, material.task, feed, total, accelerator, run,
            Display(run.log_file, total, quiet=True), StopRequest(),
        )  # fmt: skip
        ours = StageLoop(job, job.method.stages(total)[0], checkpoints.Progress(), set(), None)
        model, task = attached.model.train(), material.task
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

        def bare(place: int) -> None:
            epoch, position = divmod(place, feed.steps_per_epoch)
            (batch,) = feed.micro_batches(epoch, position)
            with torch.autocast("cpu", torch.bfloat16) if config.training.precision == "bf16" else nullcontext():
                loss = task.loss(model, batch)
            (loss.total / loss.weight).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        def timed(step) -> float:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began

        pairs = []
        for place in range(steps):
            turns = [("ours", ours.advance), ("bare", lambda place=place: bare(place))]
            pairs.append({name: timed(step) for name, step in (turns if place % 2 else turns[::-1])})
    pairs = pairs[5:]
    return {
        "overhead": median(p["ours"] / p["bare"] for p in pairs),
        "overhead of sums": sum(p["ours"] for p in pairs) / sum(p["bare"] for p in pairs),
        "our median step": median(p["ours"] for p in pairs),
        "bare median step": median(p["bare"] for p in pairs),
    }


def prepare_rows(folder: Path) -> Path:
    """The very rows that our run trains on, in its order, as token ids for the Trainer."""
    from peftcli.config.compose import compose
    from peftcli.data.sampler import BatchSampler
    from peftcli.training import prepare, seeds

    config = compose(RECIPE, OVERRIDES).config
    encoded = prepare.load_material(config).train
    order = BatchSampler(encoded.lengths, 4, seed=seeds.derive(config.seed, "order"))
    rows = [row for step in range(STEPS) for row in encoded.take(order.at(step))]
    path = folder / "rows.json"
    path.write_text(json.dumps([{k: row[k] for k in ("input_ids", "labels")} for row in rows]))
    return path


def run_trainer(rows: Path, out: Path) -> None:
    """The plain script: what a user of Transformers and PEFT would write. Prints its figures as JSON."""
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from peftcli.config.paths import sample_folder

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(time.time())

    class Ordered(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    base = sample_folder("smollm2-135m")
    words = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-4, bf16=True,
        use_cpu=True, logging_steps=1, save_strategy="no", report_to="none", seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Ordered(
        model=model, args=arguments, train_dataset=json.loads(rows.read_text()),
        data_collator=DataCollatorForSeq2Seq(words, padding=True), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(out)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    gaps = [b - a for a, b in pairwise(times)]
    print(
        json.dumps(
            {"first": times[0] - psutil.Process().create_time(), "step": median(gaps[10:]), "loss": mean(losses[-10:])}
        )
    )


def measure(command: list[str]) -> tuple[str, float, int]:
    """Output, wall seconds and peak resident bytes of a command."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    )
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return out, time.perf_counter() - began, usage.ru_maxrss * 1024


def against_trainer(repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each arm's figures over repeats in turn."""
    arms: dict[str, list[dict[str, float]]] = {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = prepare_rows(folder)
        peft = str(Path(sys.executable).parent / "peft")
        for turn in range(repeats):
            for arm in ("ours", "trainer") if turn % 2 == 0 else ("trainer", "ours"):
                if arm == "trainer":
                    command = [sys.executable, __file__, "trainer-arm", str(rows), str(folder / "out")]
                    out, wall, peak = measure(command)
                    found = json.loads(out.splitlines()[-1])
                else:
                    out, wall, peak = measure(
                        [peft, "train", RECIPE, *OVERRIDES, f"output={folder}", "--quiet", "--json"]
                    )
                    report = json.loads(out)
                    logged = [
                        json.loads(x) for x in (Path(report["folder"]) / "metrics.jsonl").read_text().splitlines()
                    ]
                    steps = [row for row in logged if "loss" in row]
                    found = {
                        "first": report["time"]["first_step_seconds"],
                        "step": median(row["seconds"] for row in steps[11:]),
                        "loss": mean(row["loss"] for row in steps[-10:]),
                    }
                arms[arm].append({**found, "wall": wall, "peak": peak})
                print(f"{arm:8} " + "  ".join(f"{k} {v:.4g}" for k, v in arms[arm][-1].items()), flush=True)
    return {arm: {key: median(row[key] for row in rows) for key in rows[0]} for arm, rows in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "trainer", "trainer-arm"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--assert", dest="hold", action="store_true", help="fail where a bound is not met")
    given = parser.parse_args()
    if given.what == "trainer-arm":
        return run_trainer(Path(given.rest[0]), Path(given.rest[1]))
    if given.what == "overhead":
        figures = overhead(given.steps)
    else:
        arms = against_trainer(given.repeats)
        ours, other = arms["ours"], arms["trainer"]
        names = {"median step": "step", "peak memory": "peak", "first step": "first", "whole command": "wall"}
        figures = {name: ours[key] / other[key] for name, key in names.items()}
        figures |= {"our final loss": ours["loss"], "Trainer's final loss": other["loss"]}
    for name, value in figures.items():
        print(f"{name}: {value:.3f}" + (f"  (bound {BOUNDS[name]})" if name in BOUNDS else ""))
    if given.hold and any(figures.get(name, 0) > bound for name, bound in BOUNDS.items()):
        raise SystemExit("a bound is not met")


if __name__ == "__main__":
    main()
