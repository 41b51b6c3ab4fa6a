"""Text data sets: from the files of their packages to one parquet file per split."""

from __future__ import annotations

import csv
import hashlib
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOREIGN = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def write(out: Path, split: str, columns: dict[str, list]) -> None:
    """Writes one split as `out/<split>.parquet`."""
    pq.write_table(pa.table(columns), out / f"{split}.parquet", compression="zstd")


def percentile(key: str) -> int:
    """0 to 99 by the hash of a key: a cut that needs no seed and does not move when rows come and go."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100


def reuters(source: Path, out: Path) -> dict:
    """`text`, `label`; the published train and test files."""
    counts = {}
    for split in ("train", "test"):
        path = next(source.rglob(f"reuters-r8-{split}.tab"))
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[3:]  # Orange's three header lines
        rows = [row for row in rows if len(row) == 2 and row[1].strip()]
        write(out, split, {"text": [row[1].strip() for row in rows], "label": [row[0] for row in rows]})
        counts[split] = len(rows)
    return {"splits": "as published", "rows": counts}


def gsm8k(source: Path, out: Path) -> dict:
    """`question`, `answer` (ends in `#### number`): the first 1,000 of the test questions, and the other 319."""
    lines = next(source.rglob("test.jsonl")).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    counts = {}
    for split, part in (("train", rows[:1000]), ("test", rows[1000:])):
        write(out, split, {key: [row[key] for row in part] for key in ("question", "answer")})
        counts[split] = len(part)
    note = "our own cut of GSM8K's test questions in their order; numbers on it are not GSM8K's published test"
    return {"splits": note, "rows": counts}


def stdlib(source: Path, out: Path) -> dict:
    """`path`, `text` of every module of the running Python, without its tests; a tenth is held out by path."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, dict[str, list]] = {split: {"path": [], "text": []} for split in ("train", "test")}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if FOREIGN.intersection(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            part = parts["test" if percentile(name.as_posix()) < 10 else "train"]
            part["path"].append(name.as_posix())
            part["text"].append(text)
    for split, columns in parts.items():
        write(out, split, columns)
    counts = {split: len(columns["path"]) for split, columns in parts.items()}
    return {"splits": "ours, by a hash of the path", "rows": counts, "python": sysconfig.get_python_version()}
