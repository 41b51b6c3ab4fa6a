"""Where the pictures of a row are: in its bytes, beside the file that names them, or in a folder of classes.

A row's picture is `{"bytes", "path"}`, as the hub keeps it; one in a file of its own has also `file`, where that is on
this machine, and `id`, its size and a hash of its beginning, which stands for its contents in fingerprints.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from peftcli.config.errors import Mistake, UserError
from peftcli.data import formats
from peftcli.data.origin import numbered
from peftcli.data.rows import Rows

COLUMN = "image"
"""What a task calls the column of pictures."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
HASHED = 65536
"""Bytes of a file's beginning that tell it from others of its size."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
LISTED = 3


def files(folder: Path) -> list[Path]:
    """Every picture below a folder by its ending, sorted; hidden files and folders are none."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def at(value: Any, folder: Path) -> Any:
    """A row's picture where the row names a file: the path is meant from the folder of the rows' own file."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if not isinstance(value, str) or not value.strip():
        return value
    return {"bytes": None, "path": value, "file": str(folder / Path(value).expanduser())}


def column(values: pa.ChunkedArray, folder: Path) -> pa.ChunkedArray | pa.Array:
    """A column of parquet as pictures: paths are resolved, bytes alone get a name, structs stay."""
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return pa.array([at(value, folder) for value in values.to_pylist()])
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return pa.array([None if v is None else {"bytes": v, "path": None} for v in values.to_pylist()])
    return values


def identified(rows: Rows) -> tuple[Rows, list[Mistake]]:
    """Rows whose pictures are in files get their `id`; those whose file is not there are left out and named.

    Raises:
        UserError: The column holds no pictures.
    """
    kind = rows.table.schema.field(COLUMN).type
    if pa.types.is_null(kind):
        return rows, []
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind}:
        what = f"the column of pictures holds {kind}, expected bytes, paths of files, or {{bytes, path}}"
        raise UserError(Mistake(what, "data.columns.image", hint="name another column: data.columns.image=COLUMN"))
    values = rows.table.column(COLUMN).combine_chunks()
    inside = values.field("bytes") if isinstance(values, pa.StructArray) else values.chunk(0).field("bytes")
    if inside.null_count < len(rows):
        return rows, []
    found: list[dict[str, Any] | None] = []
    bad, kept = [], []
    for place, picture in enumerate(rows[COLUMN]):
        if picture is None:  # an empty cell, which is told with the others
            found.append(None)
            kept.append(place)
            continue
        path = Path(picture.get("file") or picture["path"])
        try:
            found.append({"bytes": None, "path": picture["path"], "file": str(path), "id": _identity(path)})
            kept.append(place)
        except OSError as error:
            bad.append(Mistake(f"picture cannot be read: {error.strerror}", str(path)))
    chosen = rows.select(kept) if bad else rows
    place = chosen.column_names.index(COLUMN)
    return Rows(chosen.table.set_column(place, COLUMN, pa.array(found))), bad


def _identity(path: Path) -> str:
    with path.open("rb") as file:
        return f"{path.stat().st_size}-{xxhash.xxh3_128_hexdigest(file.read(HASHED))}"


def name(picture: dict[str, Any], number: int) -> str:
    """What to call a row's picture in a message or a list."""
    return picture.get("path") or f"row {number}"


class FolderOrigin:
    """One split in a folder: a sub-folder for each class, the pictures in it, at any depth."""

    def __init__(self, folder: Path, split: str, notes: list[str]):
        self.folder, self.where = folder, str(folder)
        classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        names = [p.name for p in classes]
        if names and {n.lower() for n in names} <= SPLIT_NAMES:
            what = f"the sub-folders of {folder} are splits ({', '.join(names)}), not classes"
            hint = f"name each: data.files.train={folder / names[0]} and so on"
            raise UserError(Mistake(what, f"data.files.{split}", hint=hint))
        self.pictures = [(path, under.name) for under in classes for path in files(under)]
        if not self.pictures:
            what = f"{folder} has no sub-folder with pictures in it"
            hint = f"pictures of a class go into a folder of its own, such as {folder}/good and {folder}/bad"
            raise UserError(Mistake(what, f"data.files.{split}", hint=hint))
        self._tell(notes, split, classes)

    def _tell(self, notes: list[str], split: str, classes: list[Path]) -> None:
        if empty := [p.name for p in classes if p.name not in {name for _, name in self.pictures}]:
            notes.append(f"{split}: no pictures in {', '.join(empty)}")
        taken = {path for path, _ in self.pictures}
        others = [p for p in self.folder.rglob("*") if p.is_file() and p not in taken and not p.name.startswith(".")]
        if others:
            named = ", ".join([str(p.relative_to(self.folder)) for p in sorted(others)[:LISTED]])
            notes.append(f"{split}: {len(others)} files are no pictures of a class: {named}")

    def columns(self) -> list[tuple[str, list[str]]]:
        return [(self.where, [COLUMN, "label"])]

    def lines(self, mapping: dict[str, str]) -> Iterator[formats.Line]:
        for path, label in self.pictures:
            row = {COLUMN: at(path.relative_to(self.folder).as_posix(), self.folder), "label": label}
            yield str(path), {name: row[source] for name, source in mapping.items()}

    def read(self, mapping: dict[str, str]) -> tuple[Rows, list[Mistake]]:
        rows = [row for _, row in self.lines(mapping) if isinstance(row, dict)]
        return Rows(numbered(Rows.from_list(rows).table)), []

    def identity(self) -> str:
        return "\n".join(f"{path.relative_to(self.folder)} {path.stat().st_size}" for path, _ in self.pictures)
