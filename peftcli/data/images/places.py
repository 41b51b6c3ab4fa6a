"""Where the pictures of a row are: in its bytes, beside the file that names them, or in a folder of classes.

A row's picture is `{"bytes", "path"}`, as the hub keeps it; one in a file of its own has also `file`, where that is on
this machine, and `id`, its size and a hash of its beginning, which stands for its contents in fingerprints.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from peftcli.config.errors import Mistake, UserError
from peftcli.data import formats
from peftcli.data.rows import Rows, whole_numbers

COLUMN = "image"
"""What a task calls the column of pictures."""
ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2",
    ".avif",
)  # fmt: skip
HASHED = 65536
"""Bytes of a file's beginning, and of its end, that tell it from others of its size."""
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test"})
LISTED = 3


def files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Every picture below a folder, by its ending, and every other file; both sorted.

    Links are followed, those to nowhere are in the list. Hidden files and folders are left out.

    Raises:
        UserError: A folder cannot be read.
    """
    found: tuple[list[Path], list[Path]] = ([], [])
    for path in sorted(_below(folder, frozenset())):
        found[path.suffix.lower() not in ENDINGS].append(path)
    return found


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it is in
        return
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(Mistake(f"folder cannot be read: {error.strerror}", printable(folder))) from error
    for entry in entries:
        if entry.is_dir():
            yield from _below(Path(entry.path), above | {real})
        else:
            yield Path(entry.path)


def printable(path: Path) -> str:
    """A path as text, whatever bytes its name is made of."""
    return os.fsencode(path).decode(errors="backslashreplace")


def problem(path: Path) -> Mistake | None:
    """Why a picture's name can be no row's value, or None."""
    if printable(path) == str(path):
        return None
    return Mistake("picture has a name that is no UTF-8", printable(path), hint="give it another name")


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
        except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
            bad.append(Mistake(f"picture cannot be read: {getattr(error, 'strerror', error)}", str(path)))
    chosen = rows.select(kept) if bad else rows
    place = chosen.column_names.index(COLUMN)
    return Rows(chosen.table.set_column(place, COLUMN, pa.array(found))), bad


def _identity(path: Path) -> str:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
        raise OSError(None, "it is no file")
    with path.open("rb") as file:
        digest = xxhash.xxh3_128(file.read(HASHED))
        file.seek(max(HASHED, about.st_size - HASHED))
        digest.update(file.read(HASHED))
    return f"{about.st_size}-{digest.hexdigest()}"


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
        found = [(under.name, *files(under)) for under in classes]
        self.pictures = [(path, label) for label, pictures, _ in found for path in pictures]
        if not self.pictures:
            what = f"{folder} is a folder, and has no sub-folder with pictures in it"
            hint = f"pictures of a class go into a folder of its own, such as {folder}/good and {folder}/bad"
            if files(folder)[0]:
                hint = f"the folder above, {folder.parent}, may be meant: a class is the name of a folder of pictures"
            raise UserError(Mistake(what, f"data.files.{split}", hint=hint))
        if empty := [printable(Path(label)) for label, pictures, _ in found if not pictures]:
            notes.append(f"{split}: no pictures in {', '.join(empty)}")
        loose = sorted(p for p in folder.iterdir() if not p.is_dir() and not p.name.startswith("."))
        if others := [*loose, *(path for _, _, others in found for path in others)]:
            notes.append(f"{split}: {len(others)} files are no pictures of a class: {listed(others, folder)}")

    def columns(self) -> list[tuple[str, list[str]]]:
        return [(self.where, [COLUMN, "label"])]

    def lines(self, mapping: dict[str, str]) -> Iterator[formats.Line]:
        for path, label in self.pictures:
            if mistake := problem(path):
                yield mistake.where, mistake
                continue
            row = {COLUMN: at(path.relative_to(self.folder).as_posix(), self.folder), "label": label}
            yield str(path), {name: row[source] for name, source in mapping.items()}

    def read(self, mapping: dict[str, str]) -> tuple[Rows, list[Mistake]]:
        found = [row for _, row in self.lines(mapping)]
        rows = {number: row for number, row in enumerate(found) if isinstance(row, dict)}
        columns = {name: pa.array([row[name] for row in rows.values()]) for name in mapping}
        bad = [row for row in found if isinstance(row, Mistake)]
        return Rows(pa.table(columns | {"row": whole_numbers(rows)})), bad

    def identity(self) -> str:
        sizes = [(path, path.stat().st_size if path.exists() else 0) for path, _ in self.pictures]
        return "\n".join(f"{printable(path.relative_to(self.folder))} {size}" for path, size in sizes)


def listed(paths: list[Path], folder: Path) -> str:
    """The first of some files below a folder."""
    return ", ".join(printable(path.relative_to(folder)) for path in paths[:LISTED])
