"""Where rows come from: local files, fetched samples, this package, the hub.

Each split is an `Origin`, to be read or streamed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from peftcli.config import paths
from peftcli.config.errors import Mistake, UserError, unknown
from peftcli.config.schema import DataConfig
from peftcli.data import formats, hub
from peftcli.data.images import places as pictures
from peftcli.data.origin import Origin, numbered
from peftcli.data.rows import Rows, whole_numbers

SPLITS = ("train", "validation", "test")


def find(config: DataConfig, notes: list[str]) -> dict[str, Origin]:
    """The splits that a recipe names, by train, validation and test."""
    named = {"files": config.files, "splits": config.splits, "where": config.where, "rows": config.rows}
    mistakes = [
        unknown("split", key, SPLITS, f"data.{group}.{key}")
        for group, value in named.items()
        for key in value
        if key not in SPLITS
    ]
    if config.source != "files" and not config.name:
        mistakes.append(
            Mistake("data.name is missing", "data.name", hint="a hub id, a sample of peft samples list, or bundled")
        )
    if config.source == "files" and not config.files:
        mistakes.append(Mistake("data.files is missing", "data.files", hint="data.files.train=FILE"))
    if mistakes:
        raise UserError(*mistakes)
    if config.source == "files":
        return _local(config, notes)
    have = hub.find(config, notes) if config.source == "hub" else _here(config)
    return _chosen(config, have, notes)


def _local(config: DataConfig, notes: list[str]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    mistakes: list[Mistake] = []
    owner: dict[Path, str] = {}
    for split in [s for s in SPLITS if s in config.files]:
        value = config.files[split]
        patterns = _listed(value)
        if not patterns or not all(isinstance(p, str) for p in patterns):
            what = f"data.files.{split}={value!r} names no file"
            mistakes.append(Mistake(what, f"data.files.{split}", ("a path or glob", "a list of them")))
            continue
        if len(patterns) == 1 and _of_classes(folder := Path(patterns[0]).expanduser()):
            try:
                origins[split] = pictures.FolderOrigin(folder, split, notes)
            except UserError as error:
                mistakes += error.mistakes
            continue
        files: list[Path] = []
        taken = [name for other, named in config.files.items() if other != split for name in _listed(named)]
        for pattern in patterns:
            try:
                files += formats.find(pattern, split, taken)
            except UserError as error:
                mistakes += error.mistakes
        for file in files:
            first = owner.setdefault(file.resolve(), split)
            if first != split:
                mistakes.append(Mistake(f"{file} is in both {first} and {split}", f"data.files.{split}"))
        origins[split] = FileOrigin(files, config.format)
    if mistakes:
        raise UserError(*mistakes)
    return origins


def _of_classes(folder: Path) -> bool:
    """Whether it is a folder that holds pictures, or sub-folders and no files of rows."""
    if not folder.is_dir():
        return False
    return bool(pictures.files(folder)[0]) or not any(p.suffix.lower() in formats.ENDINGS for p in folder.iterdir())


def _listed(value: Any) -> list:
    """One path or several as a list; empty where it is neither."""
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []


def _here(config: DataConfig) -> dict[str, Origin]:
    """The splits of a fetched sample, or of bundled rows."""
    folder = paths.sample_folder(str(config.name)) if config.source == "sample" else paths.bundled(str(config.name))
    have: dict[str, Origin] = {file.stem: FileOrigin([file], "parquet") for file in sorted(folder.glob("*.parquet"))}
    if not have:
        raise UserError(
            Mistake(
                f"{config.source} {config.name!r} holds no rows", str(folder), hint="data samples: peft samples list"
            )
        )
    return have


def _chosen(config: DataConfig, have: dict[str, Any], notes: list[str]) -> dict[str, Origin]:
    mistakes = [
        unknown("split", name, have, f"data.splits.{split}", f"splits of {config.name}")
        for split, name in config.splits.items()
        if name not in have
    ]
    if mistakes:
        raise UserError(*mistakes)
    # The source's validation split is no validation split where the recipe tests on it.
    named = set(config.splits.values())
    chosen = {split: config.splits.get(split, "" if split in named else split) for split in SPLITS}
    if left := sorted(set(have) - set(chosen.values())):
        notes.append(f"splits of {config.name} that are not used: {', '.join(left)}; data.splits.test=NAME uses one")
    return {split: have[name] for split, name in chosen.items() if name in have}


class FileOrigin:
    """Local files of one split, one after the other."""

    def __init__(self, files: list[Path], form: str):
        self.files = [(file, formats.kind(file, form)) for file in files]
        self.where = ", ".join(map(str, files))

    def columns(self) -> list[tuple[str, list[str]]]:
        return [(str(file), formats.columns(file, form)) for file, form in self.files]

    def lines(self, mapping: dict[str, str]) -> Iterator[formats.Line]:
        for file, form in self.files:
            for where, row in formats.lines(file, form):
                picked = {name: row.get(column) for name, column in mapping.items()} if isinstance(row, dict) else row
                if isinstance(picked, dict) and pictures.COLUMN in picked:
                    picked[pictures.COLUMN] = pictures.at(picked[pictures.COLUMN], file.parent)
                yield where, picked

    def read(self, mapping: dict[str, str]) -> tuple[Rows, list[Mistake]]:
        if all(form == "parquet" for _, form in self.files):
            return Rows(numbered(_parquet_table(self.files, mapping))), []
        values: dict[str, list] = {name: [] for name in mapping}
        numbers: list[int] = []
        bad: list[Mistake] = []
        for number, (_, row) in enumerate(self.lines(mapping)):
            if isinstance(row, Mistake):
                bad.append(row)
                continue
            numbers.append(number)
            for name, column in values.items():
                column.append(row[name])
        arrays = {name: self._array(name, column, numbers) for name, column in values.items()}
        return Rows(pa.table(arrays | {"row": whole_numbers(numbers)})), bad

    def identity(self) -> str:
        parts = []
        for file, _ in self.files:
            with file.open("rb") as opened:
                parts.append(f"{file.name} {file.stat().st_size} {hashlib.sha256(opened.read(2**20)).hexdigest()}")
        return "\n".join(parts)

    def _array(self, name: str, values: list, numbers: list[int]) -> pa.Array:
        try:
            return pa.array(values, from_pandas=True)  # NaN is no value
        except NOT_ARROW as error:
            place, what = _odd(values)
            where = places(self, [numbers[place]])[numbers[place]]
            raise UserError(Mistake(f"{name} {what}", where, hint="write all values of a column in one way")) from error


NOT_ARROW = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def _odd(values: list) -> tuple[int, str]:
    """The first value that cannot be in a column with those before it, and why."""
    first = next(value for value in values if value is not None)
    for place, value in enumerate(values):
        try:
            pa.array([value])
        except NOT_ARROW as error:
            return place, f"cannot be kept: {error}"
        if value is not None and type(value) is not type(first):
            return place, f"holds {type(first).__name__} in the rows before and {type(value).__name__} here"
    return 0, "differs within its values from row to row"


def places(origin: Origin, rows: list[int]) -> dict[int, str]:
    """Where rows stand at their source, for a message; reads the source again up to the last of them."""
    wanted, last, found = set(rows), max(rows, default=-1), {}
    for number, (where, _) in enumerate(origin.lines({})):
        if number in wanted:
            found[number] = where
        if number >= last:
            break
    return found


def _parquet_table(files: list[tuple[Path, str]], mapping: dict[str, str]) -> pa.Table:
    tables = []
    for file, _ in files:
        try:
            table = formats.parquet_file(file).read(columns=list(mapping.values()))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(Mistake(f"damaged parquet file: {str(error).splitlines()[0]}", str(file))) from error
        columns = {name: table.column(column) for name, column in mapping.items()}
        if pictures.COLUMN in columns:
            columns[pictures.COLUMN] = pictures.column(columns[pictures.COLUMN], file.parent)
        tables.append(pa.table(columns))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        where = ", ".join(str(file) for file, _ in files)
        raise UserError(Mistake(f"the files have columns of different types: {error}", where)) from error
