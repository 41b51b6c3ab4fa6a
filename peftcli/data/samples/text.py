"""Text data sets: from the files of their packages to one parquet file per split."""

from __future__ import annotations

import csv
import json
import sysconfig
from pathlib import Path

from peftcli.data.samples.table import percentile, write

FOREIGN = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def reuters(source: Path, out: Path) -> dict:
    """`text`, `label`; the published train and test files."""
    counts = {}
    for split in ("train", "test"):
        path = next(source.rglob(f"reuters-r8-{split}.tab"))
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]  # Orange's three header lines
        rows = [{"text": line[1].strip(), "label": line[0]} for line in lines if len(line) == 2 and line[1].strip()]
        write(out, split, rows)
        counts[split] = len(rows)
    return {"splits": "as published", "rows": counts}


def gsm8k(source: Path, out: Path) -> dict:
    """`question`, `answer` (ends in `#### number`): the first 1,000 of the test questions, and the other 319."""
    lines = next(source.rglob("test.jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    counts = {}
    for split, part in (("train", rows[:1000]), ("test", rows[1000:])):
        write(out, split, part)
        counts[split] = len(part)
    note = "our own cut of GSM8K's test questions in their order; numbers on it are not GSM8K's published test"
    return {"splits": note, "rows": counts}


def stdlib(source: Path, out: Path) -> dict:
    """`path`, `text` of every module of the running Python, without its tests; a tenth is held out by path."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if FOREIGN.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few modules are there to show other encodings
            continue
        if text.strip():
            split = "test" if percentile(name.as_posix()) < 10 else "train"
            parts[split].append({"path": name.as_posix(), "text": text})
    for split, rows in parts.items():
        write(out, split, rows)
    counts = {split: len(rows) for split, rows in parts.items()}
    return {"splits": "ours, by a hash of the path", "rows": counts, "python": sysconfig.get_python_version()}
