"""Predicted against measured growth of peak memory: SmolLM2-135M, LoRA r=8 on q and v, bf16, rows of 128 tokens.

    python scripts/benchmark_estimate.py                  # 2, 8 and 16 rows, the median of three processes each
    python scripts/benchmark_estimate.py --assert         # also holds them to 25 %

Growth is the process's highest resident memory minus that after every weight was read once, both as the operating
system counts them. Each measurement is a process of its own that attaches the adapter, runs the named checks and three
steps with the longest rows first. Needs the samples smollm2-135m and wordnet.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import median

RECIPE = "smollm2/wordnet-gloss_lora"
ROWS = (2, 8, 16)
BOUND = 0.25


def overrides(rows: int) -> list[str]:
    """Rows that are cut at 128 tokens, many of them that long."""
    return [
        f"training.batch_size={rows}", "training.precision=bf16", "task.max_length=128", "task.train_on_prompt=true",
        "task.template=plain", "data.rows={train: 1000, validation: 16, test: 16}", f"task.prompt='{PROMPT}'",
        "launch.device=cpu",
    ]  # fmt: skip


PROMPT = "{word} " * 60


def compare(rows: int, repeats: int) -> dict[str, float]:
    """Bytes predicted and measured at a batch size."""
    from peftcli.config.compose import compose
    from peftcli.training.estimate import estimate
    from peftcli.training.probe import probe

    config = compose(RECIPE, overrides(rows)).config
    shape, held = estimate(config).heaviest
    measured = [probe(config).growth for _ in range(repeats)]
    return {
        "rows": rows, "length": shape.length, "predicted": held.growth, "measured": median(measured),
        "lowest": min(measured), "highest": max(measured), "error": held.growth / median(measured) - 1,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--assert", dest="hold", action="store_true")
    asked = parser.parse_args()
    found = [compare(rows, asked.repeats) for rows in asked.rows]
    if asked.json:
        print(json.dumps(found))
    else:
        print(f"{'rows x tokens':>14}{'predicted MB':>14}{'measured MB':>14}{'from':>8}{'to':>8}{'error':>9}")
        for row in found:
            sizes = [row[key] / 1e6 for key in ("predicted", "measured", "lowest", "highest")]
            print("{:>14}{:>14.0f}{:>14.0f}{:>8.0f}{:>8.0f}{:>+9.1%}".format(
                f"{row['rows']} x {row['length']}", *sizes, row["error"]
            ))  # fmt: skip
    if asked.hold and any(abs(row["error"]) > BOUND for row in found):
        sys.exit(f"off by more than {BOUND:.0%}")


if __name__ == "__main__":
    main()
