"""Models of full size at random weights, made smaller and tied: seconds, memory, operations, latency, as a table in
peftcli/methods/rowcol/README.md.

    python scripts/benchmark_compress.py run --out build      # resumable; each run in a process of its own
    python scripts/benchmark_compress.py table --out build

Every run is what `peft train` does with the ImageNet recipes, but for few steps on drawn pictures
(scripts/generate_defects.py), on the CPU in float32 with two threads.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evidence import Result, Store, here, table, write_between
from generate_defects import draw

README = Path(__file__).resolve().parent.parent / "peftcli/methods/rowcol/README.md"
MODELS = {"vit-b16": ("ViT-B/16", "vit"), "resnet50": ("ResNet-50", "resnet")}
"""What each is called, and the folder of its recipes."""
MODES = {"compress": "half of its backbone", "tie": "tied"}
SIDE, BATCH, MICRO, BATCHES, STEPS = 224, 32, 8, 3, 2
ROWS = {"train": BATCH * BATCHES, "validation": 16, "test": 16}


def measure(model: str, mode: str, side: int = SIDE, overrides: Sequence[str] = ()) -> Result:
    """A run, as its report has it.

    Args:
        model: One of `MODELS`.
        mode: One of `MODES`.
        side: Of the pictures, in pixels.
        overrides: What else is not as in the recipe.

    Returns:
        `ready` seconds until the first step begins and `seconds` in all, both from the start of the process; `peak`,
        the most bytes that it held; `forms`, the costs of the original and of what was made of it.
    """
    from peftcli.artifacts.run_folder import RunFolder
    from peftcli.config.compose import compose
    from peftcli.training.run import run

    with tempfile.TemporaryDirectory() as place:
        files = {split: pictures(Path(place) / split, count, side) for split, count in ROWS.items()}
        given = [
            *(f"data.files.{split}={folder}" for split, folder in files.items()),
            f"method.mode={mode}", f"method.calibration_batches={BATCHES}", "model.weights=random", "data=imagefolder",
            f"task.image_size={side}", f"training.max_steps={STEPS}", f"training.batch_size={BATCH}",
            f"training.micro_batch_size={MICRO}", f"training.eval_batch_size={MICRO}", "training.precision=fp32",
            "training.eval_every=end", "launch.device=cpu", "launch.threads=2", f"output={place}/runs",
            *(["~method.target"] if mode == "tie" else []), *overrides,
        ]  # fmt: skip
        made = RunFolder.create(compose(f"{MODELS[model][1]}/imagenet_rowcol-compress", given).config)
        report = run(made.path, quiet=True)
    times: dict[str, float] = report["time"]
    return {
        "ready": times["first_step_seconds"] - times["median_step_seconds"],
        "seconds": times["total_seconds"],
        "peak": report["memory"]["peak_bytes"],
        "forms": report["costs"]["rows"],
    }


def pictures(folder: Path, count: int, side: int) -> Path:
    """A folder with so many drawn pictures, half of them sound and half defective; other ones for each name."""
    for label in ("bad", "good"):
        (folder / label).mkdir(parents=True)
    for number in range(count):
        label = ("bad", "good")[number % 2]
        made = draw(number, label == "bad", seed=list(ROWS).index(folder.name), side=side)
        made.save(folder / label / f"{number:04}.png")
    return folder


def jobs(models: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A run for each model and mode, by key."""
    return {f"{model} {mode}": (model, mode) for model in models for mode in MODES}


def line(name: str, found: Result) -> list[str]:
    """A run's row of the table."""

    def pair(shown: Callable[[dict[str, Any]], str]) -> str:
        return " → ".join(shown(form) for form in found["forms"])

    def milliseconds(form: dict[str, Any], size: str) -> str:
        return f"{form['latency'][size]['median']:.0f}" if size in form["latency"] else "too long"

    return [
        name,
        f"{found['ready']:.0f}",
        f"{found['seconds']:.0f}",
        f"{found['peak'] / 2**30:.1f}",
        pair(lambda form: f"{form['parameters']:,}"),
        pair(lambda form: f"{form['flops'] / 1e9:.2f}"),
        *(pair(lambda form, size=size: milliseconds(form, size)) for size in ("1", "32")),  # type: ignore[misc]
    ]


def report(results: dict[str, Result], models: Sequence[str]) -> str:
    """The text between the marks."""
    head = ["", "ready, s", "in all, s", "peak, GiB", "parameters", "10⁹ operations", "1 row, ms", "32 rows, ms"]
    rows = [
        line(f"{MODELS[model][0]}, {MODES[mode]}", results[key])
        for key, (model, mode) in jobs(models).items()
        if key in results
    ]
    return f"""\
Random weights, {SIDE} pixels, float32, two threads: {BATCHES} calibration batches of {BATCH} drawn pictures, {STEPS}
training steps that learn from the original's blocks too, in micro-batches of {MICRO}.

- Ready: from the start of the process to the first step, with imports and reading. In all: also the steps, the
  measurement, the saved model and the timing of both. Peak: the most resident memory of the process.
- Of the original → of what was made of it: parameters; operations of a row (a multiplication and an addition are two);
  times of a forward pass, the two in turn in one process, medians.
- Ranks follow what random weights use, so that operations and times of trained models differ.

{table(head, rows)}

{here("python scripts/benchmark_compress.py run && python scripts/benchmark_compress.py table")}"""


def main() -> None:
    """Run what has no result yet, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    asked = parser.parse_args()
    store = Store(asked.out.resolve() / "benchmark_compress.jsonl")
    if asked.what == "run":
        store.run(jobs(asked.models), workers=1, work=measure, fresh=True)
    else:
        write_between(README, "full size", report(store.results, asked.models))


if __name__ == "__main__":
    main()
