"""Local files to rows: jsonl, json, csv and parquet, with the file and line of whatever cannot be read.

A reader yields `(where, row)`; `where` is `file:line`, and `row` is a dictionary or, where the line is no row, a
`Mistake` that says why. What goes through the readers line by line is the same in memory and while streaming.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.config.errors import Mistake, UserError, nearest

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
MOST_FILES = 10
"""Files that a message lists."""
FIRST_ROWS = 20
"""Rows that are looked at before the rest is read."""
UTF8_HINT = "convert it with: iconv -f latin1 -t utf-8 FILE > NEW"
UTF16_HINT = "convert it with: iconv -f utf-16 -t utf-8 FILE > NEW, or save it as CSV UTF-8 in Excel"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Line = tuple[str, dict[str, Any] | Mistake]


def find(pattern: str, key: str, taken: Collection[str] = ()) -> list[Path]:
    """The files that a path or glob of a recipe names, sorted.

    Args:
        pattern: The path or glob.
        key: The split that it is for.
        taken: What the recipe's other splits name, which is not suggested.

    Raises:
        UserError: There is none, or it is a folder; with the nearest data file beside it, or all of them.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        hint = f"name the files in it, for example data.files.{key}='{path}/*.jsonl'"
        raise UserError(Mistake(f"{pattern} is a folder", f"data.files.{key}", hint=hint))
    base = Path(path.anchor) if path.is_absolute() else Path()
    if any(c in pattern for c in "*?["):
        parts = path.relative_to(base).as_posix()
        if found := sorted(p for p in base.glob(parts) if p.is_file()):
            return found
        raise UserError(Mistake(f"no file matches {pattern}", f"data.files.{key}"))
    raise UserError(_no_file(path, pattern, key, taken))


def _no_file(path: Path, pattern: str, key: str, taken: Collection[str]) -> Mistake:
    what, place = f"no file {pattern}", f"data.files.{key}"
    if not path.parent.is_dir():
        return Mistake(what, place, hint=f"the folder {path.parent} does not exist either")
    if not path.suffix:  # a folder is meant
        folders = {p.name: p for p in path.parent.iterdir() if p.is_dir() and not p.name.startswith(".")}
        close = nearest(path.name, folders)
        hint = f"for pictures {place}=FOLDER, with a sub-folder for each class; folders in {path.parent}: "
        hint += ", ".join([*sorted(folders)[:MOST_FILES], *["..."] * (len(folders) > MOST_FILES)]) or "none"
        return Mistake(f"no folder or file {pattern}", place, nearest=str(folders[close]) if close else "", hint=hint)
    beside = sorted(p for p in path.parent.iterdir() if p.suffix.lower() in ENDINGS and p.is_file())
    others = {Path(other).expanduser().resolve() for other in taken}
    free = {p.stem: p for p in beside if p.resolve() not in others}
    if close := nearest(path.stem, free):  # the ending alone would make any two files look alike
        return Mistake(what, place, nearest=str(free[close]))
    names = [p.name for p in beside[:MOST_FILES]] + (["..."] if len(beside) > MOST_FILES else [])
    return Mistake(what, place, hint=f"data files in {path.parent}: {', '.join(names) or 'none'}")


def kind(path: Path, wanted: str) -> str:
    """The format of a file: the one asked for, else by its ending.

    Raises:
        UserError: The ending tells nothing.
    """
    if wanted != "auto":
        return wanted
    if path.suffix.lower() not in ENDINGS:
        what = f"the ending of {path.name} names no format"
        raise UserError(Mistake(what, str(path), tuple(ENDINGS), hint="say which it is: data.format=jsonl"))
    return ENDINGS[path.suffix.lower()]


def lines(path: Path, form: str) -> Iterator[Line]:
    """Every row of a file in order, each with its place.

    Raises:
        UserError: The file as a whole is unreadable or empty.
    """
    try:
        with path.open("rb") as file:
            mark = file.read(2)
        if not mark:
            raise UserError(Mistake("the file is empty", str(path)))
        if form != "parquet" and mark in UTF16_MARKS:
            what = f"the file is UTF-16, not UTF-8: it begins with the byte-order mark {mark.hex(' ').upper()}"
            raise UserError(Mistake(what, str(path), hint=UTF16_HINT))
        yield from READERS[form](path)
    except OSError as error:
        raise UserError(Mistake(f"cannot read the file: {error.strerror or error}", str(path))) from error


def columns(path: Path, form: str) -> list[str]:
    """Names of the columns in the first rows of a file.

    Raises:
        UserError: The file holds no row; with the first mistake in it where there is one.
    """
    if form == "parquet":
        return parquet_file(path).schema_arrow.names
    first = [row for _, row in islice(lines(path, form), FIRST_ROWS)]
    good = [row for row in first if isinstance(row, dict)]
    bad = [row for row in first if isinstance(row, Mistake)]
    if not good:
        raise UserError(bad[0] if bad else Mistake("the file has no rows", str(path)))
    return list(dict.fromkeys(name for row in good for name in row))


def _json_lines(path: Path) -> Iterator[Line]:
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if head == b"[":
            yield from _json_list(path)
            return
        file.seek(0)
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield where, _not_utf8(where, error)
            except json.JSONDecodeError as error:
                yield where, Mistake(f"{_not_json(error)}: {_cut(raw)}", where)
            except RecursionError:
                yield where, Mistake("JSON nested too deeply to be read", where)
            else:
                yield where, row if isinstance(row, dict) else Mistake(f"not a JSON object: {_cut(raw)}", where)


def _json_list(path: Path) -> Iterator[Line]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(str(path), error)) from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(Mistake(_not_json(error), where)) from error
    for number, row in enumerate(rows, 1):
        where = f"{path} item {number}"
        yield where, row if isinstance(row, dict) else Mistake(f"not a JSON object: {_cut(row)}", where)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"


def _csv_lines(path: Path) -> Iterator[Line]:
    """All values are text, as a csv file has no types: a label 1 is the same label in every file."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            where = f"{path}:{start}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(Mistake(f"not valid csv: {error}", where)) from error
            if not values:
                continue
            if header is None:
                header = _header(values, where)
                continue
            yield where, _csv_row(header, values, where)


def _header(names: list[str], where: str) -> list[str]:
    try:
        ",".join(names).encode()
    except UnicodeEncodeError as error:
        raise UserError(_not_utf8(where, error)) from error
    names = [name.strip() for name in names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(Mistake(f"the header names {', '.join(repeated)} twice", where))
    return names


def _csv_row(header: list[str], values: list[str], where: str) -> dict[str, Any] | Mistake:
    if len(values) != len(header):
        hint = 'put quotes around values with a comma or a line break: "a, b"'
        return Mistake(f"{len(values)} values where the header has {len(header)} columns", where, hint=hint)
    try:
        ",".join(values).encode()
    except UnicodeEncodeError as error:
        return _not_utf8(where, error)
    return dict(zip(header, values, strict=True))


def parquet_file(path: Path):
    """An open parquet file.

    Raises:
        UserError: It is none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(Mistake(f"not a readable parquet file: {str(error).splitlines()[0]}", str(path))) from error


def _parquet_lines(path: Path) -> Iterator[Line]:
    number = 0
    for batch in parquet_file(path).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield f"{path} row {number}", row


def _not_utf8(where: str, error: UnicodeDecodeError | UnicodeEncodeError) -> Mistake:
    bad = error.object[error.start]
    byte = bad if isinstance(bad, int) else ord(bad) - 0xDC00
    return Mistake(f"not UTF-8: byte 0x{byte:02x} at position {error.start}", where, hint=UTF8_HINT)


def _cut(value: Any) -> str:
    text = value.decode(errors="replace").strip() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    "jsonl": _json_lines,
    "csv": _csv_lines,
    "parquet": _parquet_lines,
}
