"""A run folder as `peft train` leaves it, with made-up but realistic numbers: nothing is trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """\
schema_version: 1
name: smollm2/reuters-r8_lora
seed: 3
output: runs
model:
  name: smollm2-135m
  source: sample
  family: auto
data:
  source: sample
  name: reuters-r8
  columns: {text: text, label: label}
method:
  name: lora
  r: 8
  alpha: 16
  targets: [attention.q, attention.v]
task:
  type: classification
  head: label_words
  prompt: "{text}\\nTopic:"
training:
  batch_size: 8
  precision: auto
optim:
  lr: 0.002
"""
LABELS = ("earn", "acq", "crude", "trade", "money-fx", "interest", "ship", "grain")
TEXTS = (
    "Champion Products Inc said its board approved a two-for-one stock split of its common shares for shareholders "
    "of record as of April 1, 1987.",
    "The company reported a net loss of 12 cts a share against a profit of 41 cts a year ago. "
    "Revenue fell 8 pct to 31.2 mln dlrs.",
    "Computer Terminal Systems Inc said it has completed the sale of 200,000 shares of its common stock, and warrants "
    "to acquire an additional one mln shares, to Sedio N.V. of Lugano, Switzerland for 50,000 dlrs. It said the "
    "warrants are exercisable for five years at a purchase price of .125 dlrs per share. Computer Terminal said Sedio "
    "also has the right to buy additional shares and increase its total holdings up to 40 pct of the outstanding stock "
    "under certain circumstances involving change of control.",
    "Oil tankers waited outside the strait for the third day; brokers said freight rates had doubled since Monday.",
)


def make(folder: Path, seed: int = 0, steps: int = 240) -> Path:
    """Write a finished classification run into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "overrides.txt").write_text("optim.lr=0.002\nseed=3\n", encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in _log(draw, steps)), encoding="utf-8"
    )
    (folder / "report.json").write_text(json.dumps(report(draw), indent=1), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT, indent=1), encoding="utf-8")
    (folder / "adapter").mkdir(exist_ok=True)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "smollm2-135m"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    return folder


def edit(folder: Path, **parts: Any) -> None:
    """Replace top-level parts of the folder's report.json; None removes one."""
    path = folder / "report.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **parts}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def _log(draw: random.Random, steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        warm = min(1.0, step / 15)
        tokens = draw.randrange(700, 1900)
        rows.append(
            {
                "step": step,
                "epoch": round(step / 80, 4),
                "stage": "train",
                "loss": 0.22 + 2.1 * math.exp(-step / 35) + abs(draw.gauss(0, 0.16)),
                "grad_norm": (0.5 + 6 * math.exp(-step / 30)) * math.exp(draw.gauss(0, 0.45)),
                "lr": 0.002 * warm * 0.5 * (1 + math.cos(math.pi * step / steps)),
                "tokens": tokens,
                "rows": 8,
                "seconds": tokens / draw.uniform(1450, 1700) * (3 if step == 1 else 1),
                "memory_bytes": int(1.21e9 + 3.2e8 * (1 - math.exp(-step / 12)) + draw.uniform(0, 2e7)),
            }
        )
        if step % 40 == 0:
            quality = {"loss": 0.31 + 1.6 * math.exp(-step / 45), "accuracy": 0.93 - 0.4 * math.exp(-step / 45)}
            rows.append({"step": step, "epoch": step / 80, "stage": "train", "validation": quality})
    return rows


def report(draw: random.Random) -> dict[str, Any]:
    """The contents of report.json for 400 test rows, of which the tuned model answers 364 correctly."""
    return {
        "run": {
            "name": "smollm2/reuters-r8_lora",
            "id": "2026-11-21_22-14_smollm2-reuters-r8_lora_s3",
            "created": "2026-11-21T22:14:05Z",
            "status": "done",
            "seed": 3,
        },
        "quality": {
            "metric": "accuracy",
            "higher_is_better": True,
            "split": "test",
            "rows": [
                {"name": "untouched base", "metrics": {"accuracy": 0.43, "f1_macro": 0.2214, "loss": 2.0312}},
                {"name": "majority class", "metrics": {"accuracy": 0.495, "f1_macro": 0.0828}},
                {"name": "TF-IDF + logistic regression", "metrics": {"accuracy": 0.9675, "f1_macro": 0.9411}},
                {"name": "tuned", "metrics": {"accuracy": 0.91, "f1_macro": 0.8812, "loss": 0.3027}},
            ],
        },
        "parameters": {
            "total": 134_975_808,
            "trainable": 460_800,
            "by_role": [
                {"role": "attention.q", "modules": 30, "total": 10_229_760, "trainable": 276_480},
                {"role": "attention.v", "modules": 30, "total": 3_502_080, "trainable": 184_320},
                {"role": "attention.k", "modules": 30, "total": 3_317_760, "trainable": 0},
                {"role": "attention.o", "modules": 30, "total": 9_953_280, "trainable": 0},
                {"role": "mlp.gate", "modules": 30, "total": 26_542_080, "trainable": 0},
                {"role": "embed", "modules": 1, "total": 28_311_552, "trainable": 0},
                {"role": "", "modules": 61, "total": 35_136, "trainable": 0},
            ],
        },
        "memory": {"loaded_bytes": 912_000_000, "peak_bytes": 1_548_000_000},
        "time": {
            "total_seconds": 208.4,
            "train_seconds": 161.0,
            "first_step_seconds": 5.31,
            "median_step_seconds": 0.612,
            "rows_per_second": 13.1,
            "tokens_per_second": 1534.0,
        },
        "data": {
            "train": {"rows": 640, "tokens": 92_311, "trained_tokens": 640, "truncated": 21, "dropped": 0},
            "validation": {"rows": 200, "tokens": 28_902, "trained_tokens": 200, "truncated": 6, "dropped": 0},
            "test": {"rows": 400, "tokens": 57_775, "trained_tokens": 400, "truncated": 12, "dropped": 0},
            "notes": ["3 training rows stand again in the test split; `peft data` lists them."],
        },
        "checks": [
            {"name": "dead-adapter", "passed": True, "detail": "all 120 trained tensors get a gradient"},
            {"name": "identity-start", "passed": True, "detail": "largest difference to the base 0"},
            {"name": "frozen-moved", "passed": True, "detail": "272 frozen tensors unchanged"},
            {"name": "non-finite-loss", "passed": True, "detail": ""},
            {"name": "merge-drift", "passed": True, "detail": "0.4 % of the outputs' spread, 5 % allowed"},
        ],
        "adapter": {"path": "adapter", "bytes": 1_849_344},
        "examples": [_example(draw, row) for row in range(400)],
        "figures": [
            {
                "title": "Norm of the change by block",
                "x": list(range(30)),
                "y": [[0.2 + 0.01 * b for b in range(30)], [0.5 - 0.01 * b for b in range(30)]],
                "labels": {"x": "block", "y": "norm", "series": ["attention.q", "attention.v"]},
            }
        ],
    }


def _example(draw: random.Random, row: int) -> dict[str, Any]:
    expected = LABELS[min(7, int(draw.expovariate(0.6)))]
    tuned = expected if row % 400 >= 36 else draw.choice([label for label in LABELS if label != expected])
    base = expected if draw.random() < 0.43 else draw.choice(LABELS)
    text = TEXTS[row % len(TEXTS)]
    return {"row": row, "input": text, "expected": expected, "base": base, "tuned": tuned, "correct": tuned == expected}


ENVIRONMENT = {
    "versions": {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "peft": "0.21.2",
        "peftcli": "0.1.0",
    },
    "git": {"commit": "5bc9b08f3a11", "changed_files": 0},
    "hardware": {"cpu": "Intel Xeon", "cores": 2, "memory_bytes": 25_769_803_776, "accelerators": []},
    "seeds": {"run": 3, "data": 0},
}
