"""Image data sets: parquet files with the pictures' own bytes, a `label`, and what else is known of each."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

from peftcli.data.samples.table import percentile, write

HELD_OUT = 20  # percent
SWATCHES = "Component"  # the five skin tones by themselves: no category that could be learnt


def elpv(source: Path, out: Path) -> dict:
    """`image`, `label` (defective above one half), `probability` (0, 1/3, 2/3, 1), `cell` (mono, poly), `name`."""
    listing = next(source.rglob("labels.csv"))
    rows = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        name, probability, cell = line.split()
        label = "defective" if float(probability) > 0.5 else "functional"
        known = {"label": label, "probability": float(probability), "cell": cell, "name": Path(name).name}
        rows.append({"image": _picture(listing.parent / name), **known})
    shutil.copyfile(next(source.rglob("LICENSE.md")), out / "LICENSE.md")
    return _write(out, rows, "name")


def digits(source: Path, out: Path) -> dict:
    """`image` (8x8 gray), `label`, `name`."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = []
    for i, (pixels_HW, label) in enumerate(zip(found.images, found.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels_HW * (255 / 16)).round().astype(np.uint8)).save(buffer, "PNG")
        name = f"{i:04}.png"
        rows.append({"image": {"bytes": buffer.getvalue(), "path": name}, "label": str(label), "name": name})
    return _write(out, rows, "name")


def emoji(source: Path, out: Path) -> dict:
    """`image`, `label` (category), `fine` (subcategory), `name`, `emoji` (the code all its skin tones share).

    Cut by `emoji`: skin tones of one emoji are near duplicates and stay together. The same in every style.
    """
    listing = next(source.rglob("emoji.json"))
    folder = next(source.rglob("64"))
    rows = []
    for entry in json.loads(listing.read_text(encoding="utf-8")):
        if entry["category"] == SWATCHES:
            continue
        known = {"label": entry["category"], "fine": entry["subcategory"], "name": entry["name"]}
        for picture in (entry, *entry.get("skin_variations", {}).values()):
            if (path := folder / picture["image"]).is_file():
                rows.append({"image": _picture(path), **known, "emoji": entry["unified"]})
    shutil.copyfile(next(source.rglob("LICENSE")), out / "LICENSE")
    return _write(out, rows, "emoji")


def _picture(path: Path) -> dict:
    return {"bytes": path.read_bytes(), "path": path.name}


def _write(out: Path, rows: list[dict], key: str) -> dict:
    parts: dict[str, list[dict]] = {"train": [], "test": []}
    for row in rows:
        parts["test" if percentile(row[key]) < HELD_OUT else "train"].append(row)
    for split, part in parts.items():
        write(out, split, part, image="image")
    counts = {split: len(part) for split, part in parts.items()}
    return {"splits": f"ours, {100 - HELD_OUT}/{HELD_OUT} by a hash of `{key}`", "rows": counts}
