"""Image data sets: parquet files with the pictures' own bytes, a `label`, and what else is known of each."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

from peftcli.data.samples.table import percentile, write

HELD_OUT = 20  # percent
MODULES = (*[60] * 21, 54, *[60] * 7, 50, *[60] * 6, 72, *[60] * 3, 48, *[60] * 3)
"""Cells of each of ELPV's 44 modules (18 mono, 26 poly), in the order of the files. The package does not say which cell
is of which module; rows of cells, seams and a module that was taken twice do (30 and 39)."""
ELPV_SPLITS = {"validation": (24, 25, 28, 29, 36), "test": (1, 6, 10, 11, 16, 19, 35, 40, 41)}
"""Of modules with nearly equal cells (8 and 9, 16 and 19, 17 and 18, 20 to 23, 24 and 25, 26 and 27, 30 and 39) all are
in one split; among such cuts the one in which kinds of cells and labels are nearest to 70/10/20."""
SWATCHES = "Component"  # the five skin tones by themselves: no category that could be learnt


def elpv(source: Path, out: Path) -> dict:
    """`image`, `label` (defective above 1/2), `probability` (0, 1/3, 2/3, 1), `cell` (mono, poly), `module`, `name`.

    Cut by `module`, 1 to 44: cells of one photograph are near copies.
    """
    listing = next(source.rglob("labels.csv"))
    modules = [number for number, cells in enumerate(MODULES, 1) for _ in range(cells)]
    place = {module: split for split, among in ELPV_SPLITS.items() for module in among}
    parts: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for line in listing.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        name, probability, cell = line.split()
        label = "defective" if float(probability) > 0.5 else "functional"
        module = modules[int(re.sub(r"\D", "", Path(name).stem)) - 1]
        known = {"label": label, "probability": float(probability), "cell": cell, "module": module}
        row = {"image": _picture(listing.parent / name), **known, "name": Path(name).name}
        parts[place.get(module, "train")].append(row)
    shutil.copyfile(next(source.rglob("LICENSE.md")), out / "LICENSE.md")
    return {"splits": "ours, 70/10/20 by photographed `module`", "rows": _store(out, parts)}


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
    return {"splits": f"ours, {100 - HELD_OUT}/{HELD_OUT} by a hash of `{key}`", "rows": _store(out, parts)}


def _store(out: Path, parts: dict[str, list[dict]]) -> dict[str, int]:
    for split, part in parts.items():
        write(out, split, part, image="image")
    return {split: len(part) for split, part in parts.items()}
